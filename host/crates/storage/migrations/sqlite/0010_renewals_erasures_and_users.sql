-- 1: an Authenticate that renews has brought it, and the TokenUpdate behind that has not come. The certificate before is still the enrollment's.
ALTER TABLE certificate_bindings ADD COLUMN pending SMALLINT NOT NULL DEFAULT 0;

-- The last EraseDevice that went out to the device since its Authenticate, unless the device said that it failed.
ALTER TABLE enrollments ADD COLUMN erase_command_uuid TEXT;
UPDATE enrollments SET erase_command_uuid = sent.command_uuid FROM (
    SELECT COALESCE(e.parent_id, e.id) AS device_id, q.command_uuid AS command_uuid, MAX(q.sent_at) FROM commands c
    JOIN command_queue q ON q.tenant_id = c.tenant_id AND q.command_uuid = c.uuid
    JOIN enrollments e ON e.id = q.enrollment_id LEFT JOIN enrollments p ON p.id = e.parent_id
    WHERE c.request_type = 'EraseDevice' AND q.deliveries > 0 AND q.sent_at >= COALESCE(p.authenticated_at, e.authenticated_at)
    AND NOT EXISTS (SELECT 1 FROM command_results r WHERE r.enrollment_id = q.enrollment_id AND r.command_uuid = q.command_uuid
        AND r.status IN ('Error', 'CommandFormatError'))
    GROUP BY COALESCE(e.parent_id, e.id)) sent
WHERE enrollments.id = sent.device_id;

-- What the plugin with the hook user-authentication last said of a user, who may have no channel yet.
CREATE TABLE user_verdicts (
    device_id      TEXT NOT NULL,
    enrollment_id  TEXT NOT NULL,
    tenant_id      TEXT NOT NULL,
    -- The verdict's name in the contract, or failure.
    verdict        TEXT NOT NULL,
    is_managed     SMALLINT NOT NULL,
    -- SHA-256 of the AuthToken that the Mac was given.
    auth_token     BLOB,
    decided_at     BIGINT NOT NULL,
    PRIMARY KEY (device_id, enrollment_id),
    FOREIGN KEY (tenant_id, device_id) REFERENCES enrollments (tenant_id, id)
);

-- Apple forbids unlock tokens on Shared iPad and in User Enrollment, and a user has none.
DELETE FROM enrollment_tokens WHERE name = 'unlock-token' AND enrollment_id IN (SELECT id FROM enrollments WHERE kind <> 'device');

-- A policy's words can say anything, and this column is not sealed.
UPDATE enrollments SET decisions = (SELECT json_group_array(json_remove(value, '$.reason')) FROM json_each(enrollments.decisions))
WHERE decisions LIKE '%"reason"%';

-- Who has left cannot be woken, and that is no failure.
DELETE FROM push_failures WHERE enrollment_id IN (SELECT id FROM enrollments WHERE state <> 'enrolled');
