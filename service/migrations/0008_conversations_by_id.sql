-- no-transaction
CREATE UNIQUE INDEX CONCURRENTLY conversations_by_id ON conversations (id)
