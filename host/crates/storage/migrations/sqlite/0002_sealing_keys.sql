-- The keys that values of this database are sealed under (src/keyring.rs), never the keys themselves. A row goes when nothing is sealed under its
-- key any more.
CREATE TABLE sealing_keys (
    -- Hex; made of the key.
    id           TEXT NOT NULL PRIMARY KEY,
    -- What the key file called it when it came.
    name         TEXT NOT NULL,
    -- A known value, sealed under it: who opens it has the key.
    proof        BLOB NOT NULL,
    -- Every value is sealed under this key.
    is_complete  SMALLINT NOT NULL,
    -- Free parts of the file hold no value from before.
    is_clean     SMALLINT NOT NULL,
    created_at   BIGINT NOT NULL
);
