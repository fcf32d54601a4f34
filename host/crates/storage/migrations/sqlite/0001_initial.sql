-- The whole schema. Conventions:
--   * times are BIGINT milliseconds since the Unix epoch, UTC; flags are SMALLINT 0 or 1;
--   * every column that can hold a secret is a BLOB that begins with a format byte (src/sealed.rs);
--   * `tenant_id` stands in every row;
--   * rows that still want something have `is_open = 1`, and the hot indexes hold only those.

CREATE TABLE tenants (
    id          TEXT NOT NULL PRIMARY KEY,
    created_at  BIGINT NOT NULL
);
INSERT INTO tenants (id, created_at) VALUES ('default', 0);

-- Which tenant a push topic belongs to: the owner of the topic of an Authenticate is the tenant of the enrollment.
CREATE TABLE push_topics (
    topic       TEXT NOT NULL PRIMARY KEY,
    tenant_id   TEXT NOT NULL REFERENCES tenants (id),
    created_at  BIGINT NOT NULL
);

CREATE TABLE push_certificates (
    topic            TEXT NOT NULL PRIMARY KEY REFERENCES push_topics (topic),
    tenant_id        TEXT NOT NULL REFERENCES tenants (id),
    certificate_pem  BLOB NOT NULL,
    private_key_pem  BLOB NOT NULL,
    not_after        BIGINT NOT NULL,
    version          BIGINT NOT NULL,
    updated_at       BIGINT NOT NULL
);

-- One row per channel. Kept narrow, because it is rewritten often: raw messages, tokens and times of contact have tables of their own.
CREATE TABLE enrollments (
    id                      TEXT NOT NULL PRIMARY KEY,
    tenant_id               TEXT NOT NULL REFERENCES tenants (id),
    parent_id               TEXT,
    kind                    TEXT NOT NULL,
    topic                   TEXT NOT NULL,
    state                   TEXT NOT NULL,
    -- Counts the Authenticates: what belongs to an earlier generation is of an earlier enrollment.
    generation              BIGINT NOT NULL,
    -- TokenUpdates since the last Authenticate.
    tally                   BIGINT NOT NULL,
    re_enrolling            SMALLINT NOT NULL,
    -- NULL: the device never said.
    awaiting_configuration  SMALLINT,
    quarantined_by          TEXT,
    serial_number           TEXT,
    model                   TEXT,
    facts                   TEXT NOT NULL,
    url_params              BLOB NOT NULL,
    decisions               TEXT NOT NULL,
    push_magic              BLOB,
    push_token              BLOB,
    -- Until then an Authenticate is the renewal of the identity that the server asked for.
    renewal_until           BIGINT,
    renewal_command_uuid    TEXT,
    authenticated_at        BIGINT,
    enrolled_at             BIGINT,
    checked_out_at          BIGINT,
    created_at              BIGINT NOT NULL,
    updated_at              BIGINT NOT NULL,
    UNIQUE (tenant_id, id),
    FOREIGN KEY (tenant_id, parent_id) REFERENCES enrollments (tenant_id, id)
);
CREATE INDEX enrollments_parent ON enrollments (parent_id);
CREATE INDEX enrollments_serial_number ON enrollments (tenant_id, serial_number);

-- The latest message of each type, as received.
CREATE TABLE enrollment_messages (
    tenant_id      TEXT NOT NULL,
    enrollment_id  TEXT NOT NULL,
    message_type   TEXT NOT NULL,
    raw            BLOB NOT NULL,
    received_at    BIGINT NOT NULL,
    PRIMARY KEY (enrollment_id, message_type),
    FOREIGN KEY (tenant_id, enrollment_id) REFERENCES enrollments (tenant_id, id)
);

-- Tokens that a device escrows: `unlock-token`, `bootstrap-token`.
CREATE TABLE enrollment_tokens (
    tenant_id      TEXT NOT NULL,
    enrollment_id  TEXT NOT NULL,
    name           TEXT NOT NULL,
    token          BLOB NOT NULL,
    stored_at      BIGINT NOT NULL,
    PRIMARY KEY (enrollment_id, name),
    FOREIGN KEY (tenant_id, enrollment_id) REFERENCES enrollments (tenant_id, id)
);

-- Written in batches, apart from the enrollment that it would otherwise rewrite each time.
CREATE TABLE enrollment_presence (
    enrollment_id  TEXT NOT NULL PRIMARY KEY,
    tenant_id      TEXT NOT NULL,
    last_seen_at   BIGINT NOT NULL,
    FOREIGN KEY (tenant_id, enrollment_id) REFERENCES enrollments (tenant_id, id)
);

CREATE TABLE enrollment_tags (
    tenant_id      TEXT NOT NULL,
    enrollment_id  TEXT NOT NULL,
    tag            TEXT NOT NULL,
    created_at     BIGINT NOT NULL,
    PRIMARY KEY (enrollment_id, tag),
    FOREIGN KEY (tenant_id, enrollment_id) REFERENCES enrollments (tenant_id, id)
);
CREATE INDEX enrollment_tags_tag ON enrollment_tags (tenant_id, tag);

-- Whose a certificate is, over the whole server. `identity` is the SHA-256 of what the authority signed, `sha256` that of the whole
-- certificate, for people; both in lower-case hex.
CREATE TABLE certificate_bindings (
    identity       TEXT NOT NULL PRIMARY KEY,
    sha256         TEXT NOT NULL,
    tenant_id      TEXT NOT NULL,
    enrollment_id  TEXT NOT NULL,
    certificate    BLOB NOT NULL,
    subject        TEXT NOT NULL,
    issuer         TEXT NOT NULL,
    not_before     BIGINT NOT NULL,
    not_after      BIGINT NOT NULL,
    replaced       SMALLINT NOT NULL,
    replaced_at    BIGINT,
    created_at     BIGINT NOT NULL,
    FOREIGN KEY (tenant_id, enrollment_id) REFERENCES enrollments (tenant_id, id)
);
CREATE INDEX certificate_bindings_enrollment ON certificate_bindings (enrollment_id, replaced);

CREATE TABLE commands (
    tenant_id     TEXT NOT NULL REFERENCES tenants (id),
    uuid          TEXT NOT NULL,
    request_type  TEXT NOT NULL,
    body          BLOB NOT NULL,
    -- Of the body as queued: the same UUID with other bytes is another command.
    body_sha256   TEXT NOT NULL,
    created_at    BIGINT NOT NULL,
    PRIMARY KEY (tenant_id, uuid)
);

CREATE TABLE command_queue (
    -- The order of the queue. Never reused.
    sequence            INTEGER PRIMARY KEY AUTOINCREMENT,
    tenant_id           TEXT NOT NULL,
    enrollment_id       TEXT NOT NULL,
    command_uuid        TEXT NOT NULL,
    -- queued, reviewing, held, sent, not-now; then acknowledged, errored, expired, cancelled.
    state               TEXT NOT NULL,
    is_open             SMALLINT NOT NULL,
    priority            SMALLINT NOT NULL,
    not_before          BIGINT,
    expires_at          BIGINT,
    collapse_key        TEXT,
    idempotency_key     TEXT,
    origin              TEXT NOT NULL,
    -- How many plugin effects stand between the command and a device or a person.
    hops                BIGINT NOT NULL,
    wants_push          SMALLINT NOT NULL,
    renews_identity     SMALLINT NOT NULL,
    deliveries          BIGINT NOT NULL,
    -- The value of `deliveries` that the last NotNow answered.
    not_now_deliveries  BIGINT NOT NULL,
    not_now_count       BIGINT NOT NULL,
    created_at          BIGINT NOT NULL,
    sent_at             BIGINT,
    updated_at          BIGINT NOT NULL,
    finished_at         BIGINT,
    FOREIGN KEY (tenant_id, command_uuid) REFERENCES commands (tenant_id, uuid),
    FOREIGN KEY (tenant_id, enrollment_id) REFERENCES enrollments (tenant_id, id)
);
-- The UUID first: otherwise this index, which holds the whole history, is taken for an enrollment's open commands.
CREATE UNIQUE INDEX command_queue_command ON command_queue (command_uuid, enrollment_id);
CREATE UNIQUE INDEX command_queue_idempotency ON command_queue (enrollment_id, tenant_id, origin, idempotency_key)
    WHERE idempotency_key IS NOT NULL;
CREATE INDEX command_queue_open ON command_queue (enrollment_id, state, priority DESC, sequence) WHERE is_open = 1;
CREATE INDEX command_queue_expiring ON command_queue (expires_at) WHERE is_open = 1 AND expires_at IS NOT NULL;
CREATE INDEX command_queue_collapse ON command_queue (enrollment_id, collapse_key) WHERE is_open = 1 AND collapse_key IS NOT NULL;
CREATE INDEX command_queue_by_command ON command_queue (tenant_id, command_uuid);

-- The last report of a command; the first final one stays.
CREATE TABLE command_results (
    tenant_id      TEXT NOT NULL,
    enrollment_id  TEXT NOT NULL,
    command_uuid   TEXT NOT NULL,
    status         TEXT NOT NULL,
    is_final       SMALLINT NOT NULL,
    report         BLOB NOT NULL,
    received_at    BIGINT NOT NULL,
    PRIMARY KEY (enrollment_id, command_uuid),
    FOREIGN KEY (command_uuid, enrollment_id) REFERENCES command_queue (command_uuid, enrollment_id)
);

-- Reports of commands that are not open: unknown, cancelled, expired, or finished otherwise.
CREATE TABLE orphan_reports (
    sequence       INTEGER PRIMARY KEY AUTOINCREMENT,
    tenant_id      TEXT NOT NULL,
    enrollment_id  TEXT NOT NULL,
    command_uuid   TEXT NOT NULL,
    status         TEXT NOT NULL,
    report         BLOB NOT NULL,
    received_at    BIGINT NOT NULL,
    FOREIGN KEY (tenant_id, enrollment_id) REFERENCES enrollments (tenant_id, id)
);
CREATE INDEX orphan_reports_enrollment ON orphan_reports (enrollment_id, sequence);

CREATE TABLE plugin_key_values (
    tenant_id   TEXT NOT NULL REFERENCES tenants (id),
    plugin      TEXT NOT NULL,
    -- Compared by its bytes.
    item_key    TEXT NOT NULL,
    item_value  BLOB NOT NULL,
    version     TEXT NOT NULL,
    -- Bytes of key and value, as they count for the quota.
    size        BIGINT NOT NULL,
    expires_at  BIGINT,
    updated_at  BIGINT NOT NULL,
    PRIMARY KEY (tenant_id, plugin, item_key)
);
CREATE INDEX plugin_key_values_expiring ON plugin_key_values (expires_at) WHERE expires_at IS NOT NULL;

CREATE TABLE plugin_key_value_usage (
    tenant_id  TEXT NOT NULL REFERENCES tenants (id),
    plugin     TEXT NOT NULL,
    bytes      BIGINT NOT NULL,
    pairs      BIGINT NOT NULL,
    PRIMARY KEY (tenant_id, plugin)
);

CREATE TABLE subscriptions (
    tenant_id     TEXT NOT NULL REFERENCES tenants (id),
    subscriber    TEXT NOT NULL,
    interface     TEXT NOT NULL,
    -- JSON array.
    topics        TEXT NOT NULL,
    include_self  SMALLINT NOT NULL,
    created_at    BIGINT NOT NULL,
    PRIMARY KEY (tenant_id, subscriber, interface)
);

CREATE TABLE events (
    id             TEXT NOT NULL PRIMARY KEY,
    tenant_id      TEXT NOT NULL REFERENCES tenants (id),
    topic          TEXT NOT NULL,
    request_type   TEXT,
    occurred_at    BIGINT NOT NULL,
    enrollment_id  TEXT,
    -- The enrollment as of the event, JSON.
    who            BLOB,
    data           BLOB NOT NULL,
    hops           BIGINT NOT NULL,
    -- The subscriber whose effect it is, if it is one's.
    caused_by      TEXT
);

-- The unit of order and of leases: one subscriber's deliveries of one device, or of one timer.
CREATE TABLE partitions (
    tenant_id      TEXT NOT NULL REFERENCES tenants (id),
    subscriber     TEXT NOT NULL,
    interface      TEXT NOT NULL,
    partition_key  TEXT NOT NULL,
    -- When it may be claimed: due, or the end of its lease. NULL: nothing waits and nobody holds it.
    ready_at       BIGINT,
    -- The first waiting delivery is not due before.
    backoff_until  BIGINT,
    lease_owner    TEXT,
    lease_epoch    BIGINT NOT NULL,
    PRIMARY KEY (tenant_id, subscriber, interface, partition_key)
);
CREATE INDEX partitions_ready ON partitions (ready_at) WHERE ready_at IS NOT NULL;
CREATE INDEX partitions_ready_of ON partitions (tenant_id, subscriber, ready_at) WHERE ready_at IS NOT NULL;

CREATE TABLE deliveries (
    -- The order within a partition. Never reused.
    sequence         INTEGER PRIMARY KEY AUTOINCREMENT,
    tenant_id        TEXT NOT NULL,
    subscriber       TEXT NOT NULL,
    interface        TEXT NOT NULL,
    partition_key    TEXT NOT NULL,
    event_id         TEXT NOT NULL REFERENCES events (id),
    -- waiting; then done, dead, withdrawn.
    state            TEXT NOT NULL,
    is_open          SMALLINT NOT NULL,
    attempts         BIGINT NOT NULL,
    conflicts        BIGINT NOT NULL,
    first_failed_at  BIGINT,
    last_error       BLOB,
    -- JSON of {digest, generation, call}: who handled it last.
    handled_by       TEXT,
    created_at       BIGINT NOT NULL,
    finished_at      BIGINT,
    FOREIGN KEY (tenant_id, subscriber, interface, partition_key)
        REFERENCES partitions (tenant_id, subscriber, interface, partition_key)
);
CREATE INDEX deliveries_partition ON deliveries (tenant_id, subscriber, interface, partition_key, is_open, sequence);
CREATE INDEX deliveries_open ON deliveries (created_at) WHERE is_open = 1;
CREATE INDEX deliveries_finished ON deliveries (finished_at) WHERE is_open = 0;
CREATE INDEX deliveries_dead ON deliveries (tenant_id, sequence) WHERE state = 'dead';
CREATE INDEX deliveries_event ON deliveries (event_id);

CREATE TABLE timers (
    tenant_id      TEXT NOT NULL REFERENCES tenants (id),
    plugin         TEXT NOT NULL,
    name           TEXT NOT NULL,
    -- Empty: of no enrollment.
    enrollment_id  TEXT NOT NULL,
    due_at         BIGINT NOT NULL,
    data           BLOB NOT NULL,
    created_at     BIGINT NOT NULL,
    PRIMARY KEY (tenant_id, plugin, name, enrollment_id)
);
CREATE INDEX timers_due ON timers (due_at);

CREATE TABLE cron_entries (
    tenant_id  TEXT NOT NULL REFERENCES tenants (id),
    plugin     TEXT NOT NULL,
    name       TEXT NOT NULL,
    next_due   BIGINT NOT NULL,
    PRIMARY KEY (tenant_id, plugin, name)
);
CREATE INDEX cron_entries_due ON cron_entries (next_due);

CREATE TABLE audit (
    sequence   INTEGER PRIMARY KEY AUTOINCREMENT,
    tenant_id  TEXT NOT NULL,
    actor      TEXT NOT NULL,
    action     TEXT NOT NULL,
    target     TEXT,
    detail     BLOB NOT NULL,
    at         BIGINT NOT NULL
);
CREATE INDEX audit_tenant ON audit (tenant_id, sequence);
