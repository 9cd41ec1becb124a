-- At most one row: until when no replica may trust a recent window in Redis. A replica that has lost Redis
-- keeps it in the future; see service/src/recent.rs.
CREATE TABLE window_suspension (
    only_row        boolean     PRIMARY KEY DEFAULT true CHECK (only_row),
    suspended_until timestamptz NOT NULL
);
