-- Of a push to everyone the targets are written page by page, in the order of their ids: the last one that was; NULL: all are.
ALTER TABLE mass_pushes ADD COLUMN everyone_after TEXT;
-- How many of them were, so that each has its turn.
ALTER TABLE mass_pushes ADD COLUMN written BIGINT NOT NULL DEFAULT 0;
CREATE INDEX mass_pushes_unfinished ON mass_pushes (created_at) WHERE everyone_after IS NOT NULL;
-- For those who ask how far a push is: counted without a look at the rows.
CREATE INDEX mass_push_targets_state ON mass_push_targets (mass_push_id, state, done_at);
CREATE INDEX mass_push_targets_failed ON mass_push_targets (mass_push_id, detail, enrollment_id) WHERE state = 'failed';
