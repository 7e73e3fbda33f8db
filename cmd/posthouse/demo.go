package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"github.com/posthouse/posthouse/config"
)

// What the demo consists of. Its one role is served by a at first.
const (
	demoRole     = "demo"
	demoPassword = "demo"
)

var (
	demoUsers    = []string{"alice", "bob", "carol"}
	demoBackends = []string{"a", "b"}
)

// demo is one run of the demo.
type demo struct {
	imap, imaps uint16 // ports on loopback; 0 is any free one
	socket      string
	linger      time.Duration
	program     string // as it was called, for the lines to copy
	out         io.Writer
}

func demoCommand() *cobra.Command {
	d := demo{program: os.Args[0]}
	c := &cobra.Command{
		Use: "demo", Short: "Run a frontend with two small backends of its own, to try everything", Args: cobra.NoArgs,
		Long: "Run a frontend with two IMAP backends in this process, which share their mailboxes, so that a switch shows\n" +
			"the same mail. Everything is on loopback and gone after Ctrl-C.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			d.out = cmd.OutOrStdout()
			return d.run(cmd.Context())
		},
	}
	c.Flags().Uint16Var(&d.imap, "imap", 1143, "`PORT` for IMAP with STARTTLS; 0 is any free one")
	c.Flags().Uint16Var(&d.imaps, "imaps", 1993, "`PORT` for IMAP with TLS from the start; 0 is any free one")
	c.Flags().StringVar(&d.socket, "socket", filepath.Join(os.TempDir(), "posthouse-demo.sock"), "`PATH` of the admin socket")
	c.Flags().DurationVar(&d.linger, "linger", 2*time.Second, "how long a backend takes to end a session, so that one can watch a hold")
	return c
}

// run serves until ctx ends and leaves nothing behind.
func (d demo) run(ctx context.Context) (err error) {
	dir, err := os.MkdirTemp("", "posthouse-demo-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	backends, err := startDemoBackends(ctx, d.linger)
	if err != nil {
		return err
	}
	defer backends.close()
	path, err := d.write(dir, backends)
	if err != nil {
		return err
	}
	cfg, err := config.Load(path)
	if err != nil {
		return err
	}
	n := &narrator{out: d.out}
	i, err := build(ctx, cfg, zap.New(n), n.event)
	if errors.Is(err, syscall.EADDRINUSE) {
		return fmt.Errorf("%w\nor choose other ports: %s demo --imap 2143 --imaps 2993 --socket %s", err, d.program,
			strings.TrimSuffix(d.socket, ".sock")+"-2.sock")
	}
	if err != nil {
		return err
	}
	n.whenListening = func() { d.welcome(i) }
	return i.run(ctx)
}

// write lays out what an operator would: the configuration and all files that
// it names.
func (d demo) write(dir string, b *demoServers) (configPath string, err error) {
	socket, err := filepath.Abs(d.socket)
	if err != nil {
		return "", err
	}
	cert, key, err := selfSigned()
	if err != nil {
		return "", err
	}
	var passwd, users, backends strings.Builder
	for _, user := range demoUsers {
		fmt.Fprintf(&passwd, "%s:{PLAIN}%s\n", user, demoPassword)
		fmt.Fprintf(&users, "%s: %s\n", user, demoRole)
	}
	for n, name := range demoBackends {
		fmt.Fprintf(&backends, "  %s: {imap: %q, tls: {mode: off}, login: {style: replay}}\n", name, b.listeners[n].Addr())
	}
	yaml := fmt.Sprintf(`hostname: localhost
state_dir: state
listeners:
  - {protocol: imap, address: "127.0.0.1:%d", tls: starttls}
  - {protocol: imap, address: "127.0.0.1:%d", tls: implicit}
tls: {certificates: [{cert: cert.pem, key: key.pem}]}
auth: [{type: file, path: users.passwd}]
directory: [{type: file, path: users.map}]
backends:
%sroles:
  %s: {members: [%s], active: %s}
admin: {socket: %q}
`, d.imap, d.imaps, backends.String(), demoRole, strings.Join(demoBackends, ", "), demoBackends[0], socket)
	configPath = filepath.Join(dir, "posthouse.yaml")
	for name, content := range map[string]string{
		configPath:                         yaml,
		filepath.Join(dir, "users.passwd"): passwd.String(),
		filepath.Join(dir, "users.map"):    users.String(),
		filepath.Join(dir, "cert.pem"):     cert,
		filepath.Join(dir, "key.pem"):      key,
	} {
		if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
			return "", err
		}
	}
	return configPath, nil
}

// selfSigned makes a certificate for localhost that lives for a day.
func selfSigned() (cert, key string, err error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", "", err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "posthouse demo"},
		DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(0, 0, 1),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		return "", "", err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return "", "", err
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})),
		string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})), nil
}

// welcome prints what to type next. The listeners are in the order of the
// configuration.
func (d demo) welcome(i *instance) {
	starttls, implicit := i.listeners[0].Listener.Addr(), i.listeners[1].Listener.Addr()
	user, other := demoUsers[0], demoUsers[1]
	fmt.Fprintf(d.out, `posthouse demo: role %[1]s on backend %[2]s, with %[3]s as replica; users %[4]s, password %[5]s.
IMAP with STARTTLS on %[6]s, with TLS on %[7]s. Ctrl-C ends it and leaves nothing behind.

In a second terminal, list an INBOX:
  curl -ksS -u %[8]s:%[5]s imaps://%[7]s/INBOX -X 'FETCH 1:* (FLAGS ENVELOPE)'
read a message:
  curl -ksS -u %[8]s:%[5]s 'imaps://%[7]s/INBOX;MAILINDEX=1'
log in by hand and stay (then type: a LOGIN %[9]s %[5]s, b SELECT INBOX, c IDLE):
  openssl s_client -quiet -crlf -starttls imap -connect %[6]s
and in a third, see who is where, and move everybody to the other backend:
  %[10]s sessions --socket %[11]s
  %[10]s explain %[9]s --socket %[11]s
  %[10]s switch %[1]s --to %[3]s --socket %[11]s
  %[10]s roles --socket %[11]s
or back again, while somebody is logged in, with a login that waits for it:
  %[10]s switch %[1]s --to %[2]s --socket %[11]s & sleep 1; curl -ksS -u %[8]s:%[5]s imaps://%[7]s/

What happens, as it happens:
`, demoRole, demoBackends[0], demoBackends[1], strings.Join(demoUsers, ", "), demoPassword,
		starttls, implicit, user, other, d.program, i.cfg.Admin.Socket)
}
