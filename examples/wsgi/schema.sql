-- Tables of the example and some money to move. Can be run again.

CREATE TABLE IF NOT EXISTS accounts (
    id bigint PRIMARY KEY,
    name text NOT NULL,
    balance numeric(14, 2) NOT NULL CHECK (balance >= 0)  -- refuses what an account cannot pay
);

CREATE TABLE IF NOT EXISTS transfers (
    id bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    at timestamptz NOT NULL DEFAULT now(),
    source bigint NOT NULL REFERENCES accounts,
    target bigint NOT NULL REFERENCES accounts,
    amount numeric(14, 2) NOT NULL CHECK (amount > 0),
    idempotency_key text UNIQUE,  -- a repeated request finds the transfer of the first
    CHECK (source <> target)
);

INSERT INTO accounts (id, name, balance) VALUES
    (1, 'Ada', 1000), (2, 'Ben', 1000), (3, 'Cleo', 1000), (4, 'Dan', 1000),
    (5, 'Eve', 1000), (6, 'Finn', 1000), (7, 'Gina', 1000), (8, 'Hugo', 1000)
ON CONFLICT (id) DO NOTHING;
