-- no-transaction
CREATE INDEX CONCURRENTLY messages_by_xact ON messages (xact)
