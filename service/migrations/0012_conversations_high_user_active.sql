-- no-transaction
CREATE INDEX CONCURRENTLY conversations_high_user_active ON conversations (high_user, active_hour)
