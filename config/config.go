// Package config is the configuration file: structs with defaults, strict
// YAML, and every error at once, each with the line and what to do.
//
// The doc comments here are the reference; docs/configuration.md says the same
// to operators, and a test keeps the two together. No secret is ever part of a
// Config: it holds the paths of files, which ReadSecret and crypto/tls read.
package config

import (
	"net/netip"
	"strings"
	"time"
)

// What the enumerated keys may say.
const (
	ProtocolIMAP  = "imap"
	ProtocolPOP3  = "pop3"
	ProtocolSieve = "sieve"
	ProtocolLMTP  = "lmtp"

	TLSOff      = "off"
	TLSStartTLS = "starttls"
	TLSImplicit = "implicit"

	AuthFile    = "file"
	AuthBackend = "backend"

	StyleAuthzid    = "authzid"
	StyleMasterUser = "master-user"
	StyleReplay     = "replay"

	DoneLogout = "logout"
	DoneEOF    = "eof"

	BareNewlineReject    = "reject"
	BareNewlineNormalize = "normalize"
)

// Config is one configuration file, complete: defaults are filled in, paths
// are absolute, names resolve. Nobody edits it after Load.
type Config struct {
	// Hostname is the name in greetings and in our ID. Default: os.Hostname.
	Hostname string `yaml:"hostname"`
	// StateDir holds the role table, the floors and what else must survive a
	// restart; on a local file system (flock, fsync), one per host, never
	// copied. Default /var/lib/posthouse.
	StateDir string `yaml:"state_dir"`
	Store    Store  `yaml:"store"`
	// Fencing says what a frontend means for a switch that says nothing.
	// stable (default): the switch is aborted until it answers or the operator
	// has confirmed that it is down. leased: once its lease in the store has
	// run out it counts as ended; it has ended its sessions before.
	Fencing string `yaml:"fencing"`
	// Listeners are the sockets that clients connect to; at least one.
	Listeners []Listener `yaml:"listeners"`
	TLS       TLS        `yaml:"tls"`
	// Auth judges credentials, asked in this order; at least one, unless all
	// listeners are for LMTP.
	Auth []Auth `yaml:"auth"`
	// Directory maps users to roles, asked in this order; at least one.
	Directory []Directory `yaml:"directory"`
	Usernames Usernames   `yaml:"usernames"`
	// Backends by name: up to 64 letters, digits, dots, hyphens and
	// underscores, a letter or digit first.
	Backends map[string]Backend `yaml:"backends"`
	// Roles by name, of the same form.
	Roles    map[string]Role `yaml:"roles"`
	Admin    Admin           `yaml:"admin"`
	Limits   Limits          `yaml:"limits"`
	LMTP     LMTP            `yaml:"lmtp"`
	Hold     Hold            `yaml:"hold"`
	Fanout   Fanout          `yaml:"fanout"`
	Log      Log             `yaml:"log"`
	Greeting Greeting        `yaml:"greeting"`
}

// Listener is one socket for clients or, with protocol lmtp, for MTAs.
type Listener struct {
	// Protocol is imap, pop3, sieve or lmtp.
	Protocol string `yaml:"protocol"`
	// Address is host:port; an empty host is every address, port 0 any port.
	// For LMTP it may be unix: and the path of a unix socket, at most 107
	// octets; see Network.
	Address string `yaml:"address"`
	// TLS is starttls or implicit: there is no listener for clients without
	// TLS. For LMTP it is off (default), starttls or implicit; on a unix socket
	// always off.
	TLS string `yaml:"tls"`
	// Mode are the permissions of a unix socket, in octal. Default 0660: its
	// peers are trusted, so never everybody.
	Mode FileMode `yaml:"mode"`
	// Trusted are the addresses and networks (CIDR) whose peers may say by
	// XCLIENT and XFORWARD for whom they speak; for LMTP only. Default: nobody;
	// on a unix socket everybody, because its mode guards it. See
	// TrustedPrefixes.
	Trusted []string `yaml:"trusted"`
	// BareNewline says what becomes of a line end in a message that is not
	// CRLF; for LMTP only. reject refuses the message: two servers that
	// disagree about such line ends see two messages where there is one.
	// normalize makes it CRLF. Default (empty): normalize for trusted peers,
	// reject for others.
	BareNewline string `yaml:"bare_newline"`
	// ClientCA is a PEM file; peers must show a certificate that one of its
	// certificates has signed. For LMTP with TLS only. Default: no certificate
	// is asked for. With it no mail is taken before STARTTLS, wherever it comes
	// from.
	ClientCA string `yaml:"client_ca"`
	// InsecurePlaintext allows TLS off, and mail before STARTTLS, on an address
	// that is not loopback: mail crosses that network in the clear. For LMTP
	// only, not where it says nothing, and not beside ClientCA.
	InsecurePlaintext bool `yaml:"insecure_plaintext"`
}

// Network returns Address in the form that net.Listen takes: "unix" and a
// path, or "tcp" and host:port.
func (l Listener) Network() (network, address string) {
	if path, ok := strings.CutPrefix(l.Address, unixPrefix); ok {
		return "unix", path
	}
	return "tcp", l.Address
}

// unixPrefix begins the address of a unix socket.
const unixPrefix = "unix:"

// AllowsPlaintext reports whether the listener takes mail without TLS: never
// with implicit TLS or ClientCA, else on a unix socket, on loopback, and where
// InsecurePlaintext says so. It is for LMTP; no other listener takes a password
// without TLS.
func (l Listener) AllowsPlaintext() bool {
	return l.Protocol == ProtocolLMTP && l.TLS != TLSImplicit && l.ClientCA == "" && (l.InsecurePlaintext || l.isLocal())
}

// TrustedPrefixes returns Trusted, parsed; a plain address is a prefix of its
// whole length. Compare with unmapped addresses: no prefix is of the form
// ::ffff:192.0.2.1.
func (l Listener) TrustedPrefixes() []netip.Prefix {
	var prefixes []netip.Prefix
	for _, s := range l.Trusted {
		if p, fix := parsePrefix(s); fix == "" {
			prefixes = append(prefixes, p)
		}
	}
	return prefixes
}

// TLS is what clients meet on every listener.
type TLS struct {
	// Certificates are chosen by SNI; the first is the default. At least one,
	// unless all listeners have TLS off. Read again on SIGHUP.
	Certificates []Certificate `yaml:"certificates"`
	// MinVersion is 1.2 (default; RFC 8996 forbids what is older) or 1.3.
	MinVersion string `yaml:"min_version"`
}

// Certificate is a pair of PEM files.
type Certificate struct {
	// Cert is the file of the chain, leaf first.
	Cert string `yaml:"cert"`
	// Key is the file of the leaf's private key.
	Key string `yaml:"key"`
}

// Auth is one judge of credentials.
type Auth struct {
	// Type is file, or backend: the backend's login judges, by the client's
	// own credentials. backend stands alone and needs login style replay.
	Type string `yaml:"type"`
	// Path of the Dovecot passwd-file, for type file. Read again on SIGHUP.
	Path string `yaml:"path"`
	// Masters are users of the file who may act as any other user (an authzid
	// that is not their own name). Default: nobody.
	Masters []string `yaml:"masters"`
}

// Directory is one source of user → role.
type Directory struct {
	// Type is file: lines `user: role`.
	Type string `yaml:"type"`
	// Path of the map file. Read again on SIGHUP.
	Path string `yaml:"path"`
}

// Usernames says how login names are normalised. All frontends of a site must
// agree on it.
type Usernames struct {
	// Lowercase maps the local part to lower case. Default true: Cyrus and
	// Dovecot do so by default, and two spellings must not be two users.
	Lowercase bool `yaml:"lowercase"`
	// Allow lists those of the separators %*+!/\ that are part of this site's
	// names. Default: none. Only for those to which no backend gives a
	// meaning, or one user has two roles.
	Allow string `yaml:"allow"`
}

// Backend is one mail server instance.
type Backend struct {
	// IMAP, POP3, Sieve and LMTP are the host:port of each service. Every
	// protocol that has a listener needs one at every backend; LMTP at every
	// member of a role.
	IMAP  string     `yaml:"imap"`
	POP3  string     `yaml:"pop3"`
	Sieve string     `yaml:"sieve"`
	LMTP  string     `yaml:"lmtp"`
	TLS   BackendTLS `yaml:"tls"`
	Login Login      `yaml:"login"`
	// Replica is where it can be read while it is a replica.
	Replica Replica `yaml:"replica"`
	// Done says what proves that the backend has finished a session: logout
	// (default), the tagged reply to our own LOGOUT; or eof, its closing of
	// the connection after we have half-closed. eof is a proof with Cyrus, and
	// none with Dovecot over TLS.
	Done string `yaml:"done"`
	// InsecurePlaintext allows tls.mode off to an address that is not
	// loopback: passwords and mail cross that network in the clear.
	InsecurePlaintext bool `yaml:"insecure_plaintext"`
}

// BackendTLS is TLS from us to a backend.
type BackendTLS struct {
	// Mode is starttls (default), implicit, or off.
	Mode string `yaml:"mode"`
	// LMTPMode is that of the LMTP service, where it differs: Cyrus offers no
	// STARTTLS there with lmtpd -a. Default: Mode.
	LMTPMode string `yaml:"lmtp_mode"`
	// CA is the PEM file of the roots to trust. Default: the system's.
	CA string `yaml:"ca"`
	// ServerName must be in the backend's certificate. Default: the host of
	// the address.
	ServerName string `yaml:"server_name"`
	// InsecureSkipVerify accepts any certificate, and so anybody in between.
	InsecureSkipVerify bool `yaml:"insecure_skip_verify"`
}

// Login says how we log in to a backend.
type Login struct {
	// User is the proxy's own account, for the styles authzid and master-user.
	User string `yaml:"user"`
	// PasswordFile holds its password; see ReadSecret. Read again on SIGHUP.
	PasswordFile string `yaml:"password_file"`
	// Style is replay (default): the client's own credentials; authzid: User's
	// password and the user as authzid of SASL PLAIN (Cyrus proxyservers); or
	// master-user: the login name user*User (Dovecot).
	Style string `yaml:"style"`
}

// Admin is the operator's access.
type Admin struct {
	// Socket is the path of the admin API's unix socket. Default
	// /run/posthouse/admin.sock.
	Socket string `yaml:"socket"`
	// SocketMode are its permissions, in octal. Default 0600: who can write to
	// it can switch roles.
	SocketMode FileMode `yaml:"socket_mode"`
	// HTTP is the host:port of /metrics, /livez and /readyz. Default: none.
	HTTP string `yaml:"http"`
}

// Log says how to log, to standard error.
type Log struct {
	// Level is debug, info (default: one line per login and one at its end),
	// warn or error.
	Level string `yaml:"level"`
	// Format is json (default) or console.
	Format string `yaml:"format"`
}

// Greeting is what clients see before we know their backend.
type Greeting struct {
	// SieveCapabilities is the SIEVE list of ManageSieve's greeting. Default:
	// what all active backends have in common, learnt by asking them.
	SieveCapabilities []string `yaml:"sieve_capabilities"`
}

// Limits bound what strangers, backends and switches may take. Durations are
// written as in Go: 90s, 2s500ms, 15m. Unless it is said otherwise they are
// greater than zero.
type Limits struct {
	// PreauthTimeout is the time from the connection to complete credentials,
	// TLS handshakes included; waiting for a role or a backend does not count.
	// Default 60s, as nginx.
	PreauthTimeout time.Duration `yaml:"preauth_timeout"`
	// AuthTries is how many failed attempts a connection may make. Default 3:
	// people mistype twice, and RFC 3501 §11.2 asks to limit guessing.
	AuthTries int `yaml:"auth_tries"`
	// BadCommands is how many commands that are wrong or out of place a
	// connection may send before it has logged in. Default 10: probing
	// clients need a few, whoever speaks another protocol sends only such.
	BadCommands int `yaml:"bad_commands"`
	// AuthFailureDelay is waited before a failed attempt is answered, to slow
	// down guessing; 0s for none; less than PreauthTimeout. Default 2s, as
	// Dovecot.
	AuthFailureDelay time.Duration `yaml:"auth_failure_delay"`
	// HoldWindow is how long a login waits for its role during a switch,
	// counted from when it first waits. Default 25s: common clients give up
	// after 30.
	HoldWindow time.Duration `yaml:"hold_window"`
	// UndoReserve is the part of SwitchBudget that is kept for undoing, where a
	// role has hooks that undo; less than SwitchBudget. Default 5s.
	UndoReserve time.Duration `yaml:"undo_reserve"`
	// SwitchBudget is the time for drain, hooks and undo of a switch together;
	// less than HoldWindow, so that a switch that fails has refused nobody.
	// Default 20s.
	SwitchBudget time.Duration `yaml:"switch_budget"`
	// DrainTimeout is how long a backend may take to prove that an ended
	// session has no more work; past it a residue remains. Less than
	// SwitchBudget. Default 10s: ordinary commands end within; Cyrus was seen
	// to work on pipelined COPYs for minutes.
	DrainTimeout time.Duration `yaml:"drain_timeout"`
	// ShutdownTimeout is the time between SIGTERM and the end, with all
	// sessions drained; at least DrainTimeout. Default 30s, well below
	// systemd's TimeoutStopSec of 90 s.
	ShutdownTimeout time.Duration `yaml:"shutdown_timeout"`
	// ResidueMaxAge is the age at which a residue counts as harmless without
	// proof; 0s for never. Default 15m: an assumption, about five times the
	// longest after-run that was measured.
	ResidueMaxAge time.Duration `yaml:"residue_max_age"`
	// IdleTimeout ends a session in which nothing moves in either direction;
	// more than 31m. Default 35m: RFC 9051 §5.4 demands at least 30 minutes,
	// and clients renew IDLE every 29.
	IdleTimeout time.Duration `yaml:"idle_timeout"`
	// ConnectTimeout is for the TCP connection to a backend. Default 5s: two
	// lost SYNs are survived (they are sent again after 1 s and 3 s).
	ConnectTimeout time.Duration `yaml:"connect_timeout"`
	// BackendLoginTimeout is for everything at a backend between connecting
	// and its positive reply, TLS included; at least ConnectTimeout. Default
	// 30s: a loaded server's own authentication may take seconds.
	BackendLoginTimeout time.Duration `yaml:"backend_login_timeout"`
	// BackendLogins is how many logins may be in flight at one backend; more
	// of them wait. Default 64: the second outage is everyone reconnecting at
	// once.
	BackendLogins int `yaml:"backend_logins"`
	// MaxConnections bounds the clients' connections to this process. Default
	// 100000: at two files per session it needs LimitNOFILE above 200000, and
	// the soft limit of files bounds it further.
	MaxConnections int `yaml:"max_connections"`
	// MaxConnectionsPerIP bounds those from one IPv4 address or IPv6 /64.
	// Default 1000: a campus behind one address has hundreds of clients with
	// several connections each; raise it for webmail servers.
	MaxConnectionsPerIP int `yaml:"max_connections_per_ip"`
	// MaxParked bounds the logins that wait for roles at a time; more of them
	// are refused with a temporary code. Default 20000: each keeps a
	// goroutine and a TLS connection, about 1 GB together.
	MaxParked int `yaml:"max_parked"`
	// MaxParkedPerRole, MaxParkedPerUser and MaxParkedPerIP bound the share of
	// one; each at most MaxParked. Default 10000, 50, 500, or MaxParked where
	// that is less.
	MaxParkedPerRole int `yaml:"max_parked_per_role"`
	MaxParkedPerUser int `yaml:"max_parked_per_user"`
	MaxParkedPerIP   int `yaml:"max_parked_per_ip"`
	// MaxParkedUnverified bounds the waiting logins whose password only the
	// backend can judge (Auth of type backend): anybody could be one. Default
	// 100.
	MaxParkedUnverified int `yaml:"max_parked_unverified"`
	// EntryRate is how many of the logins that waited enter a role in a second
	// once it is open; MaxParkedPerRole of them must be through within
	// HoldWindow. Default 1000.
	EntryRate int `yaml:"entry_rate"`
	// WriteTimeout is how long one write may make no progress, to a client or
	// to a backend, before the peer counts as gone. Default 5m: a sleeping
	// laptop may wake, a fence must not wait for ever.
	WriteTimeout time.Duration `yaml:"write_timeout"`
	// Keepalive is the interval of TCP keepalives on both legs; less than 15m,
	// when ipvs forgets an idle flow (its default is 900 s). Default 120s.
	Keepalive time.Duration `yaml:"keepalive"`
}

// LMTP bounds and explains deliveries. Its numbers and durations are greater
// than zero.
type LMTP struct {
	// MaxSize is the longest message, in octets. It is announced as SIZE (RFC
	// 1870), or the least that an active backend announces, if that is less.
	// Default 104857600, 100 MiB.
	MaxSize int `yaml:"max_size"`
	// MaxRecipients is how many recipients a transaction may have; at least
	// 100 (RFC 5321 §4.5.3.1.8). Default 1000.
	MaxRecipients int `yaml:"max_recipients"`
	// MaxHops is how many Received fields a message may have before it counts
	// as looping. Default 100: RFC 5321 §6.3 asks for at least that many.
	MaxHops int `yaml:"max_hops"`
	// MaxLine is the longest line of a message, in octets without its CRLF;
	// from 998 (RFC 5321 §4.5.3.1.6) to 8000 (default). Never more: Cyrus
	// splits lines at 8189 octets, and takes a dot that begins the rest for
	// the end of the message.
	MaxLine int `yaml:"max_line"`
	// MaxConnections bounds the connections to each backend, in use and idle.
	// Default 64.
	MaxConnections int `yaml:"max_connections"`
	// IdleTimeout is how long a connection to a backend is kept for the next
	// message. Default 60s.
	IdleTimeout time.Duration `yaml:"idle_timeout"`
	// CommandTimeout is how long an MTA may be silent. Default 5m (RFC 5321
	// §4.5.3.2.7). A backend's replies before the message are bounded by
	// Limits.BackendLoginTimeout.
	CommandTimeout time.Duration `yaml:"command_timeout"`
	// ReplyTimeout is how long a backend may take for its replies after the
	// message; past it the MTA is told to try again, and a residue remains.
	// Less than 10m, when the MTA gives up itself (RFC 5321 §4.5.3.2.6).
	// Default 5m.
	ReplyTimeout time.Duration `yaml:"reply_timeout"`
	// RecipientDelimiter is one character, or empty: what follows the first one
	// in a local part is the detail, and no part of the user's name. Default +.
	RecipientDelimiter string `yaml:"recipient_delimiter"`
	// LocalDomains are the domains whose recipients are users without a domain:
	// u0001@example.org is user u0001. In lower case; * alone is every domain.
	// Default: none.
	LocalDomains []string `yaml:"local_domains"`
	// Postmaster is the user who gets mail for postmaster where the directory
	// knows no such user; RFC 5321 §4.5.1 demands that it is accepted. Default:
	// nobody.
	Postmaster string `yaml:"postmaster"`
	// CatchAll is the user who gets mail for recipients that certainly do not
	// exist. Default: nobody, and they are refused with 550 5.1.1.
	CatchAll string `yaml:"catch_all"`
}

// Hold says how long others than logins wait for roles on hold.
type Hold struct {
	// LMTP is one budget for all waiting of a transaction; greater than zero,
	// and at most Limits.HoldWindow. Default 20s, or HoldWindow where that is
	// shorter: Postfix waits 300 s for the reply to a recipient
	// (lmtp_rcpt_timeout).
	LMTP time.Duration `yaml:"lmtp"`
}

// Fanout says how the backends of one message keep pace.
type Fanout struct {
	// MaxLag is how long the slowest backend may stall the others before the
	// message goes to disk, in StateDir; greater than zero. Default 1s.
	MaxLag time.Duration `yaml:"max_lag"`
	// MaxSpool bounds the octets of all messages together that are on disk;
	// greater than zero. Once it is reached, a backend that stalls the others
	// drops out of the transaction. Default 1073741824 (1 GiB).
	MaxSpool int `yaml:"max_spool"`
}

// Default returns the configuration of an empty file, except for Hostname,
// which Load asks the system for.
func Default() *Config {
	return &Config{
		StateDir:  "/var/lib/posthouse",
		Store:     Store{Type: StoreFile, Prefix: "/posthouse", Lease: 10 * time.Second},
		Fencing:   FencingStable,
		TLS:       TLS{MinVersion: "1.2"},
		Usernames: Usernames{Lowercase: true},
		Admin:     Admin{Socket: "/run/posthouse/admin.sock", SocketMode: 0o600},
		Log:       Log{Level: "info", Format: "json"},
		Limits: Limits{
			PreauthTimeout:      60 * time.Second,
			AuthTries:           3,
			BadCommands:         10,
			AuthFailureDelay:    2 * time.Second,
			HoldWindow:          25 * time.Second,
			SwitchBudget:        20 * time.Second,
			UndoReserve:         5 * time.Second,
			DrainTimeout:        10 * time.Second,
			ShutdownTimeout:     30 * time.Second,
			ResidueMaxAge:       15 * time.Minute,
			IdleTimeout:         35 * time.Minute,
			ConnectTimeout:      5 * time.Second,
			BackendLoginTimeout: 30 * time.Second,
			BackendLogins:       64,
			MaxConnections:      100_000,
			MaxConnectionsPerIP: 1000,
			MaxParked:           20_000,
			MaxParkedPerRole:    10_000,
			MaxParkedPerUser:    50,
			MaxParkedPerIP:      500,
			MaxParkedUnverified: 100,
			EntryRate:           1000,
			WriteTimeout:        5 * time.Minute,
			Keepalive:           120 * time.Second,
		},
		LMTP: LMTP{
			MaxSize:            100 << 20,
			MaxRecipients:      1000,
			MaxHops:            100,
			MaxLine:            8000,
			MaxConnections:     64,
			IdleTimeout:        60 * time.Second,
			CommandTimeout:     5 * time.Minute,
			ReplyTimeout:       5 * time.Minute,
			RecipientDelimiter: "+",
		},
		Hold:   Hold{LMTP: 20 * time.Second},
		Fanout: Fanout{MaxLag: time.Second, MaxSpool: 1 << 30},
	}
}

// defaultBackend is what a backend is before its keys are read.
func defaultBackend() Backend {
	return Backend{TLS: BackendTLS{Mode: TLSStartTLS}, Login: Login{Style: StyleReplay}, Done: DoneLogout}
}

// TLSMode returns how TLS begins on the service, by the name of its protocol.
func (b Backend) TLSMode(protocol string) string {
	if protocol == ProtocolLMTP && b.TLS.LMTPMode != "" {
		return b.TLS.LMTPMode
	}
	return b.TLS.Mode
}

// Address returns the host:port of the service, by the name of its protocol
// (imap, pop3, sieve, lmtp); empty if the backend does not have it.
func (b Backend) Address(protocol string) string {
	switch protocol {
	case ProtocolIMAP:
		return b.IMAP
	case ProtocolPOP3:
		return b.POP3
	case ProtocolSieve:
		return b.Sieve
	case ProtocolLMTP:
		return b.LMTP
	}
	return ""
}
