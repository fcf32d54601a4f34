-- Apple forbids unlock tokens on Shared iPad and in User Enrollment, and a user has none.
DELETE FROM enrollment_tokens WHERE name = 'unlock-token' AND enrollment_id IN (SELECT id FROM enrollments WHERE kind <> 'device');

-- A policy's words can say anything, and this column is not sealed.
UPDATE enrollments SET decisions = (SELECT json_group_array(json_remove(value, '$.reason')) FROM json_each(enrollments.decisions))
WHERE decisions LIKE '%"reason"%';

-- Who has left cannot be woken, and that is no failure.
DELETE FROM push_failures WHERE enrollment_id IN (SELECT id FROM enrollments WHERE state <> 'enrolled');
