-- Since when the user is disabled: it can neither log in nor refresh, and its sessions have ended; see service/src/security/accounts.rs.
ALTER TABLE users ADD COLUMN disabled_at timestamptz;
