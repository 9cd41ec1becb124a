-- The hour in which a conversation was last active, for the list of a user's conversations: an index on last_at itself would
-- change with each message, one on the hour changes at most once an hour. It is 0 in rows from before, and in new ones until
-- their second message or the sweep notes it; see service/src/chat/conversations.rs.
ALTER TABLE conversations ADD COLUMN active_hour bigint NOT NULL DEFAULT 0;

CREATE FUNCTION hour_of(moment timestamptz) RETURNS bigint LANGUAGE sql STABLE
    RETURN floor(date_part('epoch', moment) / 3600)::bigint;

CREATE FUNCTION note_active_hour() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.active_hour := hour_of(NEW.last_at);
    RETURN NEW;
END
$$;

-- All but the first message of an hour pay for the condition alone.
CREATE TRIGGER conversations_active_hour BEFORE UPDATE ON conversations
    FOR EACH ROW WHEN (NEW.active_hour <> hour_of(NEW.last_at))
    EXECUTE FUNCTION note_active_hour();
