-- 1: somebody asked for a push, which is made once even if no command waits.
ALTER TABLE wakes ADD COLUMN asked SMALLINT NOT NULL DEFAULT 0;
-- 1: somebody is pushing, and has until due_at. Nobody is when the server starts.
ALTER TABLE wakes ADD COLUMN taken SMALLINT NOT NULL DEFAULT 0;

-- Pushes to many channels at once, which go on after the answer. What is to be done stands in wakes; here is what became of it.
CREATE TABLE mass_pushes (
    id          TEXT NOT NULL PRIMARY KEY,
    tenant_id   TEXT NOT NULL REFERENCES tenants (id),
    -- api:SUBJECT
    origin      TEXT NOT NULL,
    created_at  BIGINT NOT NULL
);
CREATE INDEX mass_pushes_created ON mass_pushes (created_at);
CREATE TABLE mass_push_targets (
    mass_push_id   TEXT NOT NULL REFERENCES mass_pushes (id),
    -- As it was asked for: perhaps of nobody.
    enrollment_id  TEXT NOT NULL,
    -- waiting, pushed, failed, unneeded
    state          TEXT NOT NULL,
    -- The apns-id, or why not.
    detail         TEXT,
    done_at        BIGINT,
    PRIMARY KEY (mass_push_id, enrollment_id)
);
CREATE INDEX mass_push_targets_waiting ON mass_push_targets (enrollment_id) WHERE state = 'waiting';
