-- Of the days before its end at which a certificate is told of (30, 14, 7, 3, 1, 0), the last one that was; NULL: none yet.
ALTER TABLE push_certificates ADD COLUMN expiry_told BIGINT;
