-- Names and addresses of deleted users, which others cannot register for a while. Only hashes are kept, without a
-- salt: they tell whether a given name is reserved, so a name can be guessed, but not read.
CREATE TABLE reserved_names (
    hash           bytea       PRIMARY KEY,
    reserved_until timestamptz NOT NULL
);

-- For the sweep of those whose time is over.
CREATE INDEX reserved_names_reserved_until ON reserved_names (reserved_until);

-- Of a `username` or an `email`, folded as in users.
CREATE FUNCTION reserved_name(kind text, folded text) RETURNS bytea LANGUAGE sql STABLE AS $$
    SELECT sha256(convert_to(kind || ' ' || folded, 'UTF8'))
$$;

CREATE FUNCTION is_reserved_name(kind text, folded text) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT EXISTS (SELECT FROM reserved_names
                   WHERE hash = reserved_name(kind, folded) AND reserved_until > clock_timestamp())
$$;

-- A reserved name is taken, also for releases that know nothing of it: they know these two constraints. With the rights of the
-- owner, because their role has none on the table. After the insertion, which may have waited for the end of a deletion.
CREATE FUNCTION refuse_reserved_names() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
BEGIN
    IF is_reserved_name('username', NEW.username_key) THEN
        RAISE unique_violation USING MESSAGE = 'the username is reserved', CONSTRAINT = 'users_username_taken';
    END IF;
    IF is_reserved_name('email', NEW.email_key) THEN
        RAISE unique_violation USING MESSAGE = 'the email is reserved', CONSTRAINT = 'users_email_taken';
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER users_reserved AFTER INSERT ON users FOR EACH ROW EXECUTE FUNCTION refuse_reserved_names();

-- What is still to be removed of deleted users, in the background: see service/src/chat/erasure.rs. One replica at a time works
-- at a row; it holds it until `held_until`.
CREATE TABLE erasures (
    user_id        uuid        PRIMARY KEY,
    erase_messages boolean     NOT NULL,
    began_at       timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- Its conversations are in erased_conversations.
    is_listed      boolean     NOT NULL DEFAULT false,
    holder         uuid,
    held_until     timestamptz NOT NULL DEFAULT '-infinity'
);

-- The conversations in which a deleted user's messages lose their content. Those up to `after_seq` are done. `xact` is the
-- transaction that ended the work: by it streams find that the peer gets an event, for as long as positions are taken up.
CREATE TABLE erased_conversations (
    conversation_id uuid        NOT NULL,
    user_id         uuid        NOT NULL,
    peer_id         uuid        NOT NULL,
    after_seq       bigint      NOT NULL DEFAULT 0,
    -- The highest that was erased.
    seq             bigint,
    xact            xid8,
    erased_at       timestamptz,
    PRIMARY KEY (conversation_id, user_id)
);

CREATE INDEX erased_conversations_to_do ON erased_conversations (user_id, conversation_id) WHERE xact IS NULL;

CREATE INDEX erased_conversations_xact ON erased_conversations (xact);

CREATE INDEX erased_conversations_peer_id ON erased_conversations (peer_id);

-- For the sweep of those that no position can lack.
CREATE INDEX erased_conversations_erased_at ON erased_conversations (erased_at);
