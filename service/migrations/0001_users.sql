-- The *_key columns hold the folded form that makes a name or an address unique; the service folds them, so
-- that uniqueness does not depend on the database's collation.
CREATE TABLE users (
    id            uuid        PRIMARY KEY,
    username      text        NOT NULL,
    username_key  text        NOT NULL CONSTRAINT users_username_taken UNIQUE,
    email         text        NOT NULL,
    email_key     text        NOT NULL CONSTRAINT users_email_taken UNIQUE,
    password_hash text        NOT NULL,
    created_at    timestamptz NOT NULL DEFAULT now()
);
