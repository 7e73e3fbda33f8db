// Package integration runs the real posthouse binary against real Cyrus and
// real Dovecot, with stock mail clients in front, and knows only what an
// operator knows: configuration files, the command line, logs.
//
// It has no build tags and skips nothing: what is missing on the machine fails
// with the line that installs it (make deps). It must run as root, because the
// servers listen on the standard ports of addresses of their own in 127/8.
//
// # Clocks
//
// Cyrus logs to syslog only. The tests receive its datagrams themselves and
// stamp them on arrival, so the logs of several instances are comparable: one
// clock, that of this process.
package integration
