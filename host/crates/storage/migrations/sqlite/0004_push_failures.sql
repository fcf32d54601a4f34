-- Channels whose last push failed, and why. Gone with the next push that Apple takes, and with the next TokenUpdate.
CREATE TABLE push_failures (
    enrollment_id  TEXT NOT NULL PRIMARY KEY,
    tenant_id      TEXT NOT NULL,
    -- One word: Apple's reason, or ours.
    code           TEXT NOT NULL,
    detail         TEXT NOT NULL,
    -- Apple says that the token is none any more: no push before another TokenUpdate.
    token_is_dead  SMALLINT NOT NULL,
    failures       BIGINT NOT NULL,
    first_at       BIGINT NOT NULL,
    last_at        BIGINT NOT NULL,
    FOREIGN KEY (tenant_id, enrollment_id) REFERENCES enrollments (tenant_id, id)
);
