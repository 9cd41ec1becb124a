-- no-transaction
CREATE INDEX CONCURRENTLY conversations_low_user_active ON conversations (low_user, active_hour)
