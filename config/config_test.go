package config

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "write the .err files anew")

// site is a directory with every file that the configurations of testdata name.
func site(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	cert, key := pair(t)
	_, otherKey := pair(t)
	for name, content := range map[string]string{
		"fullchain.pem": cert,
		"privkey.pem":   key,
		"other.key":     otherKey,
		"ca.pem":        cert,
		"users.passwd":  "alice:{PLAIN}secret\n",
		"users.map":     "alice: ma01\n",
		"proxy.secret":  "hunter2\n",
		"open.secret":   "hunter2\n",
		"empty.secret":  "\n",
		"lines.secret":  "hunter2\nhunter3\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(filepath.Join(dir, "open.secret"), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

// pair makes a self-signed certificate and its key, as PEM.
func pair(t testing.TB) (cert, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	encode := func(kind string, der []byte) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
	}
	return encode("CERTIFICATE", der), encode("PRIVATE KEY", keyDER)
}

// loadText loads content as posthouse.yaml of a fresh site.
func loadText(t *testing.T, content string) (*Config, string, error) {
	t.Helper()
	dir := site(t)
	path := filepath.Join(dir, "posthouse.yaml")
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	cfg, err := Load(path)
	return cfg, dir, err
}

// TestBad loads each testdata/*.bad.yml and compares all its faults with the
// .err file beside it.
func TestBad(t *testing.T) {
	files, err := filepath.Glob("testdata/*.bad.yml")
	if err != nil || len(files) == 0 {
		t.Fatal("no testdata", err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			content, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			cfg, dir, err := loadText(t, string(content))
			var errs Errors
			if !errors.As(err, &errs) || cfg != nil {
				t.Fatalf("loaded as %v, with error %v; want no configuration and an Errors", cfg, err)
			}
			got := strings.ReplaceAll(err.Error(), dir+"/", "") + "\n"
			got = strings.ReplaceAll(got, dir, ".")
			if strings.Contains(got, "hunter") {
				t.Errorf("a password in\n%s", got)
			}
			expected := strings.TrimSuffix(file, ".bad.yml") + ".err"
			if *update {
				if err := os.WriteFile(expected, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(expected)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("got\n%s\nwant\n%s", got, want)
			}
		})
	}
}

func TestGood(t *testing.T) {
	content, err := os.ReadFile("testdata/good.yml")
	if err != nil {
		t.Fatal(err)
	}
	got, dir, err := loadText(t, string(content))
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.Hostname = "mail.example.org"
	want.StateDir = dir + "/state"
	want.Listeners = []Listener{
		{Protocol: ProtocolIMAP, Address: "127.0.0.1:1143", TLS: TLSStartTLS},
		{Protocol: ProtocolSieve, Address: "[::1]:14190", TLS: TLSStartTLS},
	}
	want.TLS = TLS{[]Certificate{{dir + "/fullchain.pem", dir + "/privkey.pem"}}, "1.3"}
	want.Auth = []Auth{{AuthFile, dir + "/users.passwd", []string{"root", "cyrus"}}}
	want.Directory = []Directory{{"file", dir + "/users.map"}}
	want.Usernames = Usernames{Lowercase: false, Allow: "+/"}
	tls := BackendTLS{Mode: TLSImplicit, CA: dir + "/ca.pem", ServerName: "mail.example.org"}
	want.Backends = map[string]Backend{
		"a": {IMAP: "10.0.0.11:143", Sieve: "10.0.0.11:4190", LMTP: "10.0.0.11:24", TLS: tls,
			Login: Login{"proxy", dir + "/proxy.secret", StyleMasterUser}, Done: DoneLogout,
			Replica: Replica{IMAP: "10.0.0.11:1143", Sieve: "10.0.0.11:5190"}},
		"b.two": {IMAP: "127.0.0.1:143", Sieve: "localhost:4190", TLS: BackendTLS{Mode: TLSOff}, Login: Login{Style: StyleReplay}, Done: DoneEOF},
		"c": {IMAP: "mail.example.net:143", Sieve: "mail.example.net:4190", TLS: tls, Login: Login{Style: StyleReplay}, Done: DoneLogout,
			InsecurePlaintext: true},
	}
	want.Roles = map[string]Role{
		"ma01": {Members: []string{"a", "b.two"}, Active: "b.two", Scope: ScopeRole, Hooks: Hooks{
			Demote: []string{"/bin/sh", "-c", "exit 75"}, UndoDemote: []string{"/bin/true"}}},
		"ma02": {Members: []string{"a"}, Active: "a", CatchUp: CatchUp{CatchUpIMAP, 8, 0, []string{"/bin/cat", "users"}}},
		"ma03": {Members: []string{"a"}, Active: "a", CatchUp: CatchUp{CatchUpIMAP, 2, 200, nil}},
	}
	want.Admin = Admin{Socket: dir + "/admin.sock", SocketMode: 0o660}
	want.Limits.ResidueMaxAge = 0
	want.Limits.AuthFailureDelay = 0
	want.Log = Log{"debug", "console"}
	want.Greeting.SieveCapabilities = []string{"fileinto", "vnd.dovecot.pipe", "comparator-i;ascii-numeric"}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

// TestGoodLMTP is a frontend that MTAs alone use.
func TestGoodLMTP(t *testing.T) {
	content, err := os.ReadFile("testdata/lmtp_good.yml")
	if err != nil {
		t.Fatal(err)
	}
	got, dir, err := loadText(t, string(content))
	if err != nil {
		t.Fatal(err)
	}
	want := []Listener{
		{Protocol: ProtocolLMTP, Address: "unix:" + dir + "/lmtp.sock", TLS: TLSOff, Mode: 0o660},
		{Protocol: ProtocolLMTP, Address: "unix:/run/other.sock", TLS: TLSOff, Mode: 0o600, BareNewline: BareNewlineReject},
		{Protocol: ProtocolLMTP, Address: "127.0.0.1:24", TLS: TLSOff, Trusted: []string{"127.0.0.0/8", "::1", "::ffff:192.0.2.1"}},
		{Protocol: ProtocolLMTP, Address: "192.0.2.1:24", TLS: TLSOff, BareNewline: BareNewlineNormalize, InsecurePlaintext: true},
	}
	if !reflect.DeepEqual(got.Listeners, want) {
		t.Errorf("got  %+v\nwant %+v", got.Listeners, want)
	}
	if got, want := fmt.Sprint(got.Listeners[2].TrustedPrefixes()), "[127.0.0.0/8 ::1/128 192.0.2.1/32]"; got != want {
		t.Errorf("trusted are %s, want %s", got, want)
	}
	for i, want := range []string{"unix " + dir + "/lmtp.sock", "unix /run/other.sock", "tcp 127.0.0.1:24", "tcp 192.0.2.1:24"} {
		if network, address := got.Listeners[i].Network(); network+" "+address != want {
			t.Errorf("listener %d listens on %s %s, want %s", i, network, address, want)
		}
	}
	delivery := Default().LMTP
	delivery.MaxLine, delivery.MaxRecipients = 998, 100
	delivery.RecipientDelimiter, delivery.LocalDomains = "", []string{"example.org", "mail.example.org"}
	delivery.Postmaster, delivery.CatchAll = "alice", "bob@example.net"
	if !reflect.DeepEqual(got.LMTP, delivery) {
		t.Errorf("got  %+v\nwant %+v", got.LMTP, delivery)
	}
	if got.Hold.LMTP != 12*time.Second {
		t.Errorf("deliveries wait %s, and logins 12s", got.Hold.LMTP)
	}
}

// TestDelimiter: each character that may begin a detail, and each that may not.
func TestDelimiter(t *testing.T) {
	for r := rune(0x20); r <= 0x100; r++ {
		v := &validation{document: &document{lines: map[string]int{"": 1}}, cfg: Default()}
		v.delimiter(string(r))
		want := strings.ContainsRune("!#$%&'*+-/=?^_`{|}~", r)
		if got := len(v.errs) == 0; got != want {
			t.Errorf("%q may be a delimiter: %t, want %t", r, got, want)
		}
	}
	v := &validation{document: &document{lines: map[string]int{"": 1}}, cfg: Default()}
	if v.delimiter("+-"); len(v.errs) != 1 {
		t.Errorf("two characters: %v", v.errs)
	}
}

// TestAllowsPlaintext says where mail is taken without TLS.
func TestAllowsPlaintext(t *testing.T) {
	for _, tt := range []struct {
		listener Listener
		want     bool
	}{
		{Listener{Address: "unix:/run/lmtp", TLS: TLSOff}, true},
		{Listener{Address: "127.0.0.1:24", TLS: TLSOff}, true},
		{Listener{Address: "[::1]:24", TLS: TLSStartTLS}, true},
		{Listener{Address: "localhost:24", TLS: TLSImplicit}, false},
		{Listener{Address: "127.0.0.1:24", TLS: TLSStartTLS, ClientCA: "ca.pem"}, false},
		{Listener{Address: "192.0.2.1:24", TLS: TLSStartTLS}, false},
		{Listener{Address: ":24", TLS: TLSStartTLS}, false},
		{Listener{Address: ":24", TLS: TLSStartTLS, InsecurePlaintext: true}, true},
	} {
		tt.listener.Protocol = ProtocolLMTP
		if got := tt.listener.AllowsPlaintext(); got != tt.want {
			t.Errorf("%+v: %t, want %t", tt.listener, got, tt.want)
		}
	}
	if (Listener{Protocol: ProtocolIMAP, Address: "127.0.0.1:143", TLS: TLSStartTLS}).AllowsPlaintext() {
		t.Error("passwords in the clear")
	}
}

// TestExample is the file of the issue, complete.
func TestExample(t *testing.T) {
	cfg, dir, err := loadText(t, Example())
	if err != nil {
		t.Fatal(err)
	}
	if got, want := cfg.Backends["a"].Login.PasswordFile, dir+"/proxy.secret"; got != want {
		t.Errorf("password file %s, want %s", got, want)
	}
	for service, want := range map[string]string{"imap": "10.0.0.12:143", "pop3": "10.0.0.12:110", "sieve": "10.0.0.12:4190", "lmtp": "10.0.0.12:24", "smtp": ""} {
		if got := cfg.Backends["b"].Address(service); got != want {
			t.Errorf("%s at %q, want %q", service, got, want)
		}
	}
}

const minimal = `
listeners: [{protocol: imap, address: ":1143", tls: starttls}]
tls: {certificates: [{cert: fullchain.pem, key: privkey.pem}]}
auth: [{type: file, path: users.passwd}]
directory: [{type: file, path: users.map}]
backends: {a: {imap: "10.0.0.1:143"}}
roles: {r: {members: [a], active: a}}
`

// TestDefaults asserts every default, by loading a file that sets none.
func TestDefaults(t *testing.T) {
	got, dir, err := loadText(t, minimal+"limits:\nlog: ~\n")
	if err != nil {
		t.Fatal(err)
	}
	hostname, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	want := &Config{
		Hostname:  hostname,
		StateDir:  "/var/lib/posthouse",
		Store:     Store{Type: "file", Prefix: "/posthouse", Lease: 10 * time.Second},
		Fencing:   "stable",
		Listeners: []Listener{{Protocol: "imap", Address: ":1143", TLS: "starttls"}},
		TLS:       TLS{[]Certificate{{dir + "/fullchain.pem", dir + "/privkey.pem"}}, "1.2"},
		Auth:      []Auth{{Type: "file", Path: dir + "/users.passwd"}},
		Directory: []Directory{{"file", dir + "/users.map"}},
		Usernames: Usernames{Lowercase: true},
		Backends:  map[string]Backend{"a": {IMAP: "10.0.0.1:143", TLS: BackendTLS{Mode: "starttls"}, Login: Login{Style: "replay"}, Done: "logout"}},
		Roles:     map[string]Role{"r": {Members: []string{"a"}, Active: "a"}},
		Admin:     Admin{"/run/posthouse/admin.sock", 0o600, ""},
		Limits: Limits{
			PreauthTimeout: time.Minute, AuthTries: 3, BadCommands: 10, AuthFailureDelay: 2 * time.Second,
			HoldWindow: 25 * time.Second, SwitchBudget: 20 * time.Second, UndoReserve: 5 * time.Second, DrainTimeout: 10 * time.Second,
			ShutdownTimeout: 30 * time.Second, ResidueMaxAge: 15 * time.Minute, IdleTimeout: 35 * time.Minute,
			ConnectTimeout: 5 * time.Second, BackendLoginTimeout: 30 * time.Second, BackendLogins: 64,
			MaxConnections: 100000, MaxConnectionsPerIP: 1000, MaxParked: 20000,
			MaxParkedPerRole: 10000, MaxParkedPerUser: 50, MaxParkedPerIP: 500, MaxParkedUnverified: 100, EntryRate: 1000,
			WriteTimeout: 5 * time.Minute, Keepalive: 2 * time.Minute,
		},
		LMTP: LMTP{
			MaxSize: 104857600, MaxRecipients: 1000, MaxHops: 100, MaxLine: 8000, MaxConnections: 64,
			IdleTimeout: time.Minute, CommandTimeout: 5 * time.Minute, ReplyTimeout: 5 * time.Minute, RecipientDelimiter: "+",
		},
		Hold:   Hold{20 * time.Second},
		Fanout: Fanout{time.Second, 1 << 30},
		Log:    Log{"info", "json"},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

func TestLoadAbsentFile(t *testing.T) {
	_, err := Load("testdata/absent.yml")
	const want = "testdata/absent.yml:1: cannot be read: no such file or directory; name a configuration file that this user may read"
	if err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

func TestReadSecret(t *testing.T) {
	path := filepath.Join(t.TempDir(), "secret")
	for _, tt := range []struct{ content, want string }{
		{"hunter2", "hunter2"},
		{"hunter2\n", "hunter2"},
		{"hunter2\r\n", "hunter2"},
		{" with spaces ", " with spaces "},
		{"", ""},
		{"\n", ""},
		{"hunter2\n\n", ""},
		{"hun\x00ter2", ""},
		{strings.Repeat("x", maxSecret+1), ""},
	} {
		if err := os.WriteFile(path, []byte(tt.content), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := ReadSecret(path)
		if got != tt.want || (err == nil) != (tt.want != "") {
			t.Errorf("%.20q: got %q, %v", tt.content, got, err)
		}
		if err != nil && strings.Contains(err.Error(), "hun") {
			t.Errorf("%.20q: secret in %v", tt.content, err)
		}
	}
}
