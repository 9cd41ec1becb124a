-- What every replica asks several times a second before it may use the recent windows: see
-- service/src/chat/permission.rs. `redis` says which Redis has the windows, `epoch` changes whenever windows of before
-- may no longer be used, and `settled` is the epoch that all replicas may rely on at once.
ALTER TABLE window_suspension
    ADD COLUMN epoch   bigint NOT NULL DEFAULT 0,
    ADD COLUMN redis   text,
    ADD COLUMN settled text;

-- Users who were deleted in the last hour, so that replicas refuse them although a window could answer. `xact` tells a
-- replica which rows are new, in whatever order the deletions committed.
CREATE TABLE deleted_users (
    user_id    uuid        NOT NULL,
    xact       xid8        NOT NULL DEFAULT pg_current_xact_id(),
    deleted_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE INDEX deleted_users_xact ON deleted_users (xact);

CREATE FUNCTION note_deleted_users() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO deleted_users (user_id) SELECT id FROM gone;
    RETURN NULL;
END
$$;

CREATE TRIGGER users_deleted AFTER DELETE ON users
    REFERENCING OLD TABLE AS gone FOR EACH STATEMENT EXECUTE FUNCTION note_deleted_users();
