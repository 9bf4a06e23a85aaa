-- One row per answered request. `predicted` and `probabilities` hold all rows of the batch:
-- int32[rows] and float32[rows * classes], little-endian; NULL where the model states no classification.
CREATE TABLE IF NOT EXISTS predictions (
    prediction_id TEXT PRIMARY KEY,
    client_id     TEXT NOT NULL,
    model         TEXT NOT NULL,
    version       TEXT NOT NULL,
    experiment    TEXT NOT NULL,
    arm           TEXT NOT NULL,
    time_seconds  REAL NOT NULL,
    rows          INTEGER NOT NULL,
    class_list    INTEGER REFERENCES class_lists (id),
    predicted     BLOB,
    probabilities BLOB
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS predictions_by_experiment ON predictions (experiment, arm) WHERE experiment <> '';

-- A client's own request id stands for a prediction while it was used once.
CREATE TABLE IF NOT EXISTS aliases (
    client_id     TEXT PRIMARY KEY,
    prediction_id TEXT NOT NULL,
    uses          INTEGER NOT NULL
) WITHOUT ROWID;

-- Names of classes, as a JSON list, stored once.
CREATE TABLE IF NOT EXISTS class_lists (
    id    INTEGER PRIMARY KEY,
    names TEXT NOT NULL UNIQUE
);

-- The label that holds for a row. `correct` and `log_loss` are what the prediction scored against it.
CREATE TABLE IF NOT EXISTS labels (
    prediction_id    TEXT NOT NULL,
    row              INTEGER NOT NULL,
    truth            INTEGER NOT NULL,
    time_seconds     REAL NOT NULL,
    received_seconds REAL NOT NULL,
    correct          INTEGER,
    log_loss         REAL,
    PRIMARY KEY (prediction_id, row)
) WITHOUT ROWID;

-- Labels whose prediction has not come, and those whose id stands for several.
CREATE TABLE IF NOT EXISTS pending_labels (
    id               TEXT NOT NULL,
    row              INTEGER NOT NULL,
    truth            NOT NULL,
    time_seconds     REAL NOT NULL,
    received_seconds REAL NOT NULL,
    PRIMARY KEY (id, row, truth)
) WITHOUT ROWID;

-- Labels that do not hold: overruled by a later one, or found invalid when their prediction came.
CREATE TABLE IF NOT EXISTS label_history (
    id               TEXT NOT NULL,
    row              INTEGER NOT NULL,
    truth            NOT NULL,
    time_seconds     REAL NOT NULL,
    received_seconds REAL NOT NULL,
    reason           TEXT NOT NULL
);
