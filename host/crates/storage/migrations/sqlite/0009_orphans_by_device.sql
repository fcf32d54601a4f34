-- What is kept of reports without a command is bounded by device: who its users are, and how many, is what it says itself.
ALTER TABLE orphan_reports ADD COLUMN device_id TEXT NOT NULL DEFAULT '';
-- Of the whole report, in bytes; more than `report` has if it was cut. NULL: it was not.
ALTER TABLE orphan_reports ADD COLUMN length BIGINT;
UPDATE orphan_reports SET device_id =
    COALESCE((SELECT COALESCE(parent_id, id) FROM enrollments WHERE enrollments.id = orphan_reports.enrollment_id), enrollment_id);
CREATE INDEX orphan_reports_device ON orphan_reports (device_id, sequence);

-- Counted for the metrics.
CREATE INDEX enrollments_state ON enrollments (state);
CREATE INDEX push_failures_code ON push_failures (code);
