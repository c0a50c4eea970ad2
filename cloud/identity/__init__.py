"""Who devices are: certificates, enrolment, renewal, revocation."""
