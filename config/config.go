// Package config is the configuration file: structs with defaults, strict
// YAML, and every error at once, each with the line and what to do.
//
// The doc comments here are the reference; docs/configuration.md says the same
// to operators, and a test keeps the two together. No secret is ever part of a
// Config: it holds the paths of files, which ReadSecret and crypto/tls read.
package config

import "time"

// What the enumerated keys may say.
const (
	ProtocolIMAP  = "imap"
	ProtocolPOP3  = "pop3"
	ProtocolSieve = "sieve"

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
	// Listeners are the sockets that clients connect to; at least one.
	Listeners []Listener `yaml:"listeners"`
	TLS       TLS        `yaml:"tls"`
	// Auth judges credentials, asked in this order; at least one.
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
	Log      Log             `yaml:"log"`
	Greeting Greeting        `yaml:"greeting"`
}

// Store says where the role table lives.
type Store struct {
	// Type is file (default): one file in StateDir; one host, any number of
	// frontends on it.
	Type string `yaml:"type"`
}

// Listener is one socket for clients.
type Listener struct {
	// Protocol is imap, pop3 or sieve.
	Protocol string `yaml:"protocol"`
	// Address is host:port; an empty host is every address, port 0 any port.
	Address string `yaml:"address"`
	// TLS is starttls or implicit. There is no listener without TLS.
	TLS string `yaml:"tls"`
}

// TLS is what clients meet on every listener.
type TLS struct {
	// Certificates are chosen by SNI; the first is the default. At least one.
	// Read again on SIGHUP.
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
	// protocol that has a listener needs one at every backend. LMTP is
	// accepted and validated; nothing uses it yet.
	IMAP  string     `yaml:"imap"`
	POP3  string     `yaml:"pop3"`
	Sieve string     `yaml:"sieve"`
	LMTP  string     `yaml:"lmtp"`
	TLS   BackendTLS `yaml:"tls"`
	Login Login      `yaml:"login"`
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

// Role is a group of mailboxes that lives on one backend at a time.
type Role struct {
	// Members are the backends that hold a copy, each once; at least one.
	Members []string `yaml:"members"`
	// Active is the member that serves the role at first. It seeds an empty
	// store only; afterwards the table decides.
	Active string `yaml:"active"`
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
	// WriteTimeout is how long one write may make no progress, to a client or
	// to a backend, before the peer counts as gone. Default 5m: a sleeping
	// laptop may wake, a fence must not wait for ever.
	WriteTimeout time.Duration `yaml:"write_timeout"`
	// Keepalive is the interval of TCP keepalives on both legs; less than 15m,
	// when ipvs forgets an idle flow (its default is 900 s). Default 120s.
	Keepalive time.Duration `yaml:"keepalive"`
}

// Default returns the configuration of an empty file, except for Hostname,
// which Load asks the system for.
func Default() *Config {
	return &Config{
		StateDir:  "/var/lib/posthouse",
		Store:     Store{Type: "file"},
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
			WriteTimeout:        5 * time.Minute,
			Keepalive:           120 * time.Second,
		},
	}
}

// defaultBackend is what a backend is before its keys are read.
func defaultBackend() Backend {
	return Backend{TLS: BackendTLS{Mode: TLSStartTLS}, Login: Login{Style: StyleReplay}, Done: DoneLogout}
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
	case "lmtp":
		return b.LMTP
	}
	return ""
}
