-- no-transaction
CREATE INDEX CONCURRENTLY conversations_without_hour ON conversations (id) WHERE active_hour = 0
