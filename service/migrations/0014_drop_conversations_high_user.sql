-- no-transaction
DROP INDEX CONCURRENTLY conversations_high_user
