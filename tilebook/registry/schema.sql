CREATE TABLE tilebook_alembic_version (
    version_num VARCHAR(32) NOT NULL,
    CONSTRAINT tilebook_alembic_version_pkc PRIMARY KEY (version_num)
);

CREATE TABLE device (
    id INTEGER NOT NULL,
    name VARCHAR(128) NOT NULL,
    arch VARCHAR(64) NOT NULL,
    sm_count INTEGER NOT NULL,
    CONSTRAINT pk_device PRIMARY KEY (id),
    CONSTRAINT uq_device_name_arch_sm_count UNIQUE (name, arch, sm_count)
);

CREATE TABLE environment (
    id INTEGER NOT NULL,
    digest VARCHAR(64) NOT NULL,
    versions TEXT NOT NULL,
    CONSTRAINT pk_environment PRIMARY KEY (id),
    CONSTRAINT uq_environment_digest UNIQUE (digest)
);

CREATE TABLE kernel (
    id INTEGER NOT NULL,
    op VARCHAR(64) NOT NULL,
    digest VARCHAR(64) NOT NULL,
    CONSTRAINT pk_kernel PRIMARY KEY (id),
    CONSTRAINT uq_kernel_op_digest UNIQUE (op, digest)
);

CREATE TABLE problem (
    id INTEGER NOT NULL,
    op VARCHAR(64) NOT NULL,
    "key" TEXT NOT NULL,
    CONSTRAINT pk_problem PRIMARY KEY (id),
    CONSTRAINT uq_problem_op_key UNIQUE (op, "key")
);

CREATE TABLE trial (
    id INTEGER NOT NULL,
    sha256 VARCHAR(64) NOT NULL,
    origin VARCHAR(64) NOT NULL,
    problem_id INTEGER NOT NULL,
    device_id INTEGER NOT NULL,
    environment_id INTEGER NOT NULL,
    kernel_id INTEGER NOT NULL,
    implementation VARCHAR(64) NOT NULL,
    config TEXT NOT NULL,
    status VARCHAR(16) NOT NULL,
    failure VARCHAR(32),
    reason TEXT NOT NULL,
    time_ms DOUBLE,
    samples_ms TEXT NOT NULL,
    facts TEXT NOT NULL,
    created_at VARCHAR(32) NOT NULL,
    CONSTRAINT pk_trial PRIMARY KEY (id),
    CONSTRAINT uq_trial_sha256 UNIQUE (sha256),
    CONSTRAINT fk_trial_problem_id FOREIGN KEY(problem_id) REFERENCES problem (id),
    CONSTRAINT fk_trial_device_id FOREIGN KEY(device_id) REFERENCES device (id),
    CONSTRAINT fk_trial_environment_id FOREIGN KEY(environment_id) REFERENCES environment (id),
    CONSTRAINT fk_trial_kernel_id FOREIGN KEY(kernel_id) REFERENCES kernel (id)
);

CREATE INDEX ix_trial_problem_id_device_id_kernel_id ON trial (problem_id, device_id, kernel_id);

CREATE TABLE miss (
    id INTEGER NOT NULL,
    sha256 VARCHAR(64) NOT NULL,
    problem_id INTEGER NOT NULL,
    device_id INTEGER NOT NULL,
    calls BIGINT NOT NULL,
    time_ms DOUBLE NOT NULL,
    last_seen VARCHAR(32) NOT NULL,
    CONSTRAINT pk_miss PRIMARY KEY (id),
    CONSTRAINT uq_miss_problem_id_device_id UNIQUE (problem_id, device_id),
    CONSTRAINT fk_miss_problem_id FOREIGN KEY(problem_id) REFERENCES problem (id),
    CONSTRAINT fk_miss_device_id FOREIGN KEY(device_id) REFERENCES device (id)
);

CREATE TABLE revocation (
    id INTEGER NOT NULL,
    sha256 VARCHAR(64) NOT NULL,
    scope VARCHAR(64) NOT NULL,
    op VARCHAR(64) NOT NULL,
    implementation VARCHAR(64) NOT NULL,
    kernel VARCHAR(64),
    arch VARCHAR(64),
    triton VARCHAR(256),
    config TEXT NOT NULL,
    reason TEXT NOT NULL,
    origin VARCHAR(64) NOT NULL,
    trusted BOOLEAN NOT NULL,
    created_at VARCHAR(32) NOT NULL,
    made TEXT,
    CONSTRAINT pk_revocation PRIMARY KEY (id),
    CONSTRAINT uq_revocation_scope UNIQUE (scope)
);

CREATE TABLE verdict (
    id INTEGER NOT NULL,
    sha256 VARCHAR(64) NOT NULL,
    served VARCHAR(64) NOT NULL,
    problem_id INTEGER NOT NULL,
    device_id INTEGER NOT NULL,
    environment_id INTEGER NOT NULL,
    kernel_id INTEGER NOT NULL,
    status VARCHAR(16) NOT NULL,
    mode VARCHAR(16) NOT NULL,
    default_time_ms DOUBLE,
    speedup DOUBLE,
    speedup_low DOUBLE,
    speedup_high DOUBLE,
    sources TEXT NOT NULL,
    origin VARCHAR(64) NOT NULL,
    trusted BOOLEAN NOT NULL,
    created_at VARCHAR(32) NOT NULL,
    notes TEXT NOT NULL,
    CONSTRAINT pk_verdict PRIMARY KEY (id),
    CONSTRAINT uq_verdict_problem_id_device_id_kernel_id UNIQUE (problem_id, device_id, kernel_id),
    CONSTRAINT fk_verdict_problem_id FOREIGN KEY(problem_id) REFERENCES problem (id),
    CONSTRAINT fk_verdict_device_id FOREIGN KEY(device_id) REFERENCES device (id),
    CONSTRAINT fk_verdict_environment_id FOREIGN KEY(environment_id) REFERENCES environment (id),
    CONSTRAINT fk_verdict_kernel_id FOREIGN KEY(kernel_id) REFERENCES kernel (id)
);

CREATE INDEX ix_verdict_device_id_kernel_id ON verdict (device_id, kernel_id);

CREATE TABLE finalist (
    id INTEGER NOT NULL,
    verdict_id INTEGER NOT NULL,
    place INTEGER NOT NULL,
    implementation VARCHAR(64) NOT NULL,
    config TEXT NOT NULL,
    time_ms DOUBLE,
    code VARCHAR(64) NOT NULL,
    predicted_ms DOUBLE,
    is_default BOOLEAN NOT NULL,
    speedup DOUBLE,
    speedup_low DOUBLE,
    speedup_high DOUBLE,
    samples_ms TEXT NOT NULL,
    again TEXT NOT NULL,
    CONSTRAINT pk_finalist PRIMARY KEY (id),
    CONSTRAINT uq_finalist_verdict_id_place UNIQUE (verdict_id, place),
    CONSTRAINT fk_finalist_verdict_id FOREIGN KEY(verdict_id) REFERENCES verdict (id)
);

CREATE TABLE position (
    verdict_id INTEGER NOT NULL,
    device_id INTEGER NOT NULL,
    kernel_id INTEGER NOT NULL,
    form VARCHAR(16) NOT NULL,
    spot VARCHAR(28) NOT NULL,
    CONSTRAINT pk_position PRIMARY KEY (verdict_id),
    CONSTRAINT fk_position_verdict_id FOREIGN KEY(verdict_id) REFERENCES verdict (id)
);

CREATE INDEX ix_position_device_id_kernel_id_form_spot ON position (device_id, kernel_id, form, spot);
