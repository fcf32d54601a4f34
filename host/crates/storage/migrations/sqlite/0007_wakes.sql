-- What the time to the next push is reckoned by was one number; a device that came, a new command and Apple's trouble each want their own.
CREATE TABLE new_wakes (
    enrollment_id  TEXT NOT NULL PRIMARY KEY,
    tenant_id      TEXT NOT NULL,
    due_at         BIGINT NOT NULL,
    -- 1: somebody asked for a push, which is made once even if no command waits.
    asked          SMALLINT NOT NULL,
    -- 1: somebody is pushing, and has until due_at. Nobody is when the server starts.
    taken          SMALLINT NOT NULL,
    -- Sessions that ended with deferred commands, since the queue was last empty.
    deferrals      BIGINT NOT NULL,
    -- Pushes that Apple took, since the device last came or was last wanted.
    unanswered     BIGINT NOT NULL,
    -- Pushes in a row that reached nobody.
    failures       BIGINT NOT NULL,
    -- The number of the commit in which a push was last wanted: one that began before it does not answer it. Begins again with the server.
    wanted_in      BIGINT NOT NULL,
    updated_at     BIGINT NOT NULL,
    FOREIGN KEY (tenant_id, enrollment_id) REFERENCES enrollments (tenant_id, id)
);
INSERT INTO new_wakes (enrollment_id, tenant_id, due_at, asked, taken, deferrals, unanswered, failures, wanted_in, updated_at)
    SELECT enrollment_id, tenant_id, COALESCE(due_at, updated_at), asked, taken, 0, 0, 0, 0, updated_at FROM wakes;
DROP TABLE wakes;
ALTER TABLE new_wakes RENAME TO wakes;
CREATE INDEX wakes_due ON wakes (due_at);

-- Commands that were queued with a push, or deferred, before there was this table.
INSERT INTO wakes (enrollment_id, tenant_id, due_at, asked, taken, deferrals, unanswered, failures, wanted_in, updated_at)
    SELECT enrollment_id, tenant_id, MAX(updated_at), 0, 0, 0, 0, 0, 0, MAX(updated_at) FROM command_queue
    WHERE is_open = 1 AND (wants_push = 1 OR state = 'not-now')
    GROUP BY enrollment_id, tenant_id
    ON CONFLICT (enrollment_id) DO NOTHING;

-- Clearing away walked over all dead letters, which stay, to find what may go.
DROP INDEX deliveries_finished;
CREATE INDEX deliveries_finished ON deliveries (finished_at) WHERE is_open = 0 AND state <> 'dead';
