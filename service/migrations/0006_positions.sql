-- Which transaction stored a message, and which one touched a conversation last: by them a stream finds what its position
-- lacks; see service/src/chat/streams/mod.rs. Rows from before have none, and belong to no position. Defaults and the trigger
-- supply them for releases that know nothing of these columns.
ALTER TABLE messages ADD COLUMN xact xid8;
ALTER TABLE messages ALTER COLUMN xact SET DEFAULT pg_current_xact_id();

ALTER TABLE conversations ADD COLUMN last_xact xid8;
ALTER TABLE conversations ALTER COLUMN last_xact SET DEFAULT pg_current_xact_id();

CREATE FUNCTION note_conversation_xact() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.last_xact := pg_current_xact_id();
    RETURN NEW;
END
$$;

-- A release that sets the column itself pays for the condition alone.
CREATE TRIGGER conversations_xact BEFORE UPDATE ON conversations
    FOR EACH ROW WHEN (NEW.last_xact IS NOT DISTINCT FROM OLD.last_xact AND NEW.last_seq <> OLD.last_seq)
    EXECUTE FUNCTION note_conversation_xact();

-- The server whose transactions the columns name: a database that was restored elsewhere has another.
CREATE TABLE position_server (
    only_row          boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    system_identifier bigint  NOT NULL
);

-- The server, and its timeline, which changes with each failover. Transactions of one epoch have one order.
CREATE FUNCTION position_epoch() RETURNS text LANGUAGE sql STABLE AS $$
    SELECT system_identifier || '.' ||
           CASE WHEN pg_is_in_recovery() THEN '0' ELSE left(pg_walfile_name(pg_current_wal_lsn()), 8) END
    FROM pg_control_system()
$$;
