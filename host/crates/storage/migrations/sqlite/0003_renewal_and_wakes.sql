-- 1 from an Authenticate that renewed the identity until the TokenUpdate that follows it.
ALTER TABLE enrollments ADD COLUMN renewing SMALLINT NOT NULL DEFAULT 0;

-- When a channel with waiting commands is to be woken. One row per channel: whatever asks for a push, the device is told once.
CREATE TABLE wakes (
    enrollment_id  TEXT NOT NULL PRIMARY KEY,
    tenant_id      TEXT NOT NULL,
    -- NULL: the device comes by itself; the row remembers how often it was woken.
    due_at         BIGINT,
    -- Pushes since the queue was last empty: what the time to the next one is doubled by.
    step           BIGINT NOT NULL,
    updated_at     BIGINT NOT NULL,
    FOREIGN KEY (tenant_id, enrollment_id) REFERENCES enrollments (tenant_id, id)
);
CREATE INDEX wakes_due ON wakes (due_at) WHERE due_at IS NOT NULL;
