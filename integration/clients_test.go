package integration

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// service is something that stock clients can be pointed at: posthouse, or one
// of the servers directly.
type service struct {
	name string            // in its certificate
	at   map[string]string // "imap/starttls" → address
	// quotesChallenges: its ManageSieve sends SASL challenges as quoted
	// strings, as Dovecot does and RFC 5804 §4 allows.
	quotesChallenges bool
}

// door is one way in: a protocol and how TLS begins.
type door struct {
	protocol, tls string // "imap", "implicit"
	name          string
	address       string
}

func (s service) door(t testing.TB, protocol, tls string) door {
	t.Helper()
	address := s.at[protocol+"/"+tls]
	if address == "" {
		t.Fatalf("%s has no %s/%s", s.name, protocol, tls)
	}
	return door{protocol, tls, s.name, address}
}

func (d door) host() string { host, _, _ := net.SplitHostPort(d.address); return host }
func (d door) port() string { _, port, _ := net.SplitHostPort(d.address); return port }

// login is a user and the way in which a client is to prove who it is.
type login struct {
	user string
	how  string // "PLAIN", "PLAIN-IR", "LOGIN" (SASL), "USERPASS" (IMAP LOGIN, POP3 USER and PASS)
}

const clientLimit = 60 * time.Second

// curl runs one curl invocation, which is one login, and returns what it wrote
// to stdout. path is what follows the host in the URL.
func curl(t testing.TB, d door, l login, path string, args ...string) []byte {
	t.Helper()
	scheme := d.protocol
	argv := []string{"-sS", "--max-time", "50", "--cacert", lab.ca.file, "--user", l.user + ":" + password,
		"--resolve", d.name + ":" + d.port() + ":" + d.host()}
	if d.tls == "implicit" {
		scheme += "s"
	} else {
		argv = append(argv, "--ssl-reqd")
	}
	switch l.how {
	case "PLAIN":
		argv = append(argv, "--login-options", "AUTH=PLAIN")
	case "PLAIN-IR":
		argv = append(argv, "--login-options", "AUTH=PLAIN", "--sasl-ir")
	case "LOGIN":
		argv = append(argv, "--login-options", "AUTH=LOGIN")
	default:
		t.Fatalf("curl cannot log in by %s", l.how)
	}
	argv = append(argv, args...)
	argv = append(argv, scheme+"://"+d.name+":"+d.port()+"/"+path)
	cmd := exec.Command("curl", argv...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		t.Fatalf("curl %s: %v: %s", strings.Join(argv, " "), err, errs.String())
	}
	return out.Bytes()
}

// curlAppend stores the message in INBOX by IMAP APPEND.
func curlAppend(t testing.TB, d door, l login, message []byte) {
	t.Helper()
	file := filepath.Join(newDir(t, "append"), "message")
	must(t, os.WriteFile(file, message, 0o600))
	curl(t, d, l, "INBOX", "-T", file)
}

// mbsyncBox is an mbsync configuration between a local Maildir and INBOX.
type mbsyncBox struct {
	config  string
	maildir string
}

// newMbsync configures mbsync; it logs in by IMAP LOGIN (USERPASS) or, with
// SASL-IR where offered, by AUTHENTICATE PLAIN or LOGIN.
func newMbsync(t testing.TB, d door, l login) mbsyncBox {
	t.Helper()
	dir := newDir(t, "mbsync")
	box := mbsyncBox{filepath.Join(dir, "rc"), filepath.Join(dir, "mail", "INBOX")}
	for _, sub := range []string{"cur", "new", "tmp"} {
		must(t, os.MkdirAll(filepath.Join(box.maildir, sub), 0o700))
	}
	ssl := map[string]string{"starttls": "STARTTLS", "implicit": "IMAPS"}[d.tls]
	mech := map[string]string{"USERPASS": "LOGIN", "PLAIN-IR": "PLAIN"}[l.how]
	writeFile(t, box.config, fmt.Sprintf(`
IMAPAccount far
Host %s
Port %s
User %s
Pass %s
SSLType %s
CertificateFile %s
AuthMechs %s
Timeout 40

IMAPStore far
Account far

MaildirStore near
Path %s/
Inbox %s

Channel c
Far :far:
Near :near:
Patterns INBOX
Create Near
SyncState *
`, d.name, d.port(), l.user, password, ssl, lab.ca.file, mech, filepath.Join(dir, "mail"), box.maildir))
	writeFile(t, filepath.Join(dir, "hosts"), "127.0.0.1 localhost\n"+d.host()+" "+d.name+"\n")
	return box
}

// put lays a message into the Maildir, to be pushed by the next sync.
func (box mbsyncBox) put(t testing.TB, name string, message []byte) {
	t.Helper()
	must(t, os.WriteFile(filepath.Join(box.maildir, "new", name), bytes.ReplaceAll(message, []byte("\r\n"), []byte("\n")), 0o600))
}

// sync runs mbsync once, in both directions. It knows hosts by name only, and
// checks the certificate's: so it gets an /etc/hosts of its own.
func (box mbsyncBox) sync(t testing.TB) {
	t.Helper()
	const script = `mount --bind "$1" /etc/hosts && shift && exec "$@"`
	out, err := runTool(t, clientLimit, nil, "unshare", "-m", "sh", "-c", script, "sh",
		filepath.Join(filepath.Dir(box.config), "hosts"), "mbsync", "-V", "-c", box.config, "c")
	if err != nil {
		t.Fatalf("mbsync: %v\n%s", err, out)
	}
}

// messages returns the messages in the Maildir, with CRLF line ends and without
// the header field that mbsync adds.
func (box mbsyncBox) messages(t testing.TB) []string {
	t.Helper()
	var all []string
	files, _ := filepath.Glob(filepath.Join(box.maildir, "[cn]*", "*"))
	for _, file := range files {
		raw, err := os.ReadFile(file)
		must(t, err)
		text := regexp.MustCompile(`(?m)^X-TUID: .*\n`).ReplaceAllString(string(raw), "")
		all = append(all, strings.ReplaceAll(text, "\n", "\r\n"))
	}
	return all
}

// sieveConnect runs sieve-connect, which does STARTTLS only, with its own
// commands, one a line.
func sieveConnect(t testing.TB, d door, l login, commands ...string) string {
	t.Helper()
	mech := map[string]string{"PLAIN-IR": "PLAIN", "LOGIN": "LOGIN"}[l.how]
	script := filepath.Join(newDir(t, "sieve"), "commands")
	writeFile(t, script, strings.Join(commands, "\n")+"\n")
	out, err := runTool(t, clientLimit, strings.NewReader(password+"\n"), "sieve-connect", "--server", d.host(), "--port", d.port(),
		"--tlscafile", lab.ca.file, "--tlshostname", d.name, "--user", l.user, "--authmech", mech, "--passwordfd", "0",
		"--exec", script)
	if err != nil {
		t.Fatalf("sieve-connect: %v\n%s", err, out)
	}
	return out
}

// conversation is an interactive client whose stdin we type on.
type conversation struct {
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  *buffer
	seen int // how much of out earlier expectations have used up
	done chan struct{}
}

// cyrusTest starts imtest, pop3test or sivtest and waits until it has logged in.
func cyrusTest(t testing.TB, d door, l login) *conversation {
	t.Helper()
	argv := []string{"-p", d.port(), "-u", l.user, "-a", l.user, "-w", password}
	if d.tls == "implicit" {
		argv = append(argv, "-s")
	} else {
		argv = append(argv, "-t", "")
	}
	program := map[string]string{"imap": "imtest", "pop3": "pop3test", "sieve": "sivtest"}[d.protocol]
	mech := map[string]string{"PLAIN-IR": "PLAIN", "PLAIN": "PLAIN", "LOGIN": "LOGIN"}[l.how]
	switch {
	case l.how == "USERPASS" && d.protocol == "imap":
		mech = "login"
	case l.how == "USERPASS":
		mech = "user"
	}
	argv = append(argv, "-m", mech, d.host())
	c := converse(t, append([]string{cyrusBin + program}, argv...)...)
	c.expect(t, `(?m)^Authenticated\.`)
	return c
}

// openssl starts `openssl s_client`, which checks the certificate.
func openssl(t testing.TB, d door, args ...string) *conversation {
	t.Helper()
	argv := []string{"openssl", "s_client", "-quiet", "-connect", d.address, "-servername", d.name, "-CAfile", lab.ca.file,
		"-verify_hostname", d.name, "-verify_return_error"}
	if d.tls == "starttls" {
		argv = append(argv, "-starttls", d.protocol)
	}
	return converse(t, append(argv, args...)...)
}

func converse(t testing.TB, argv ...string) *conversation {
	t.Helper()
	c := &conversation{cmd: exec.Command(argv[0], argv[1:]...), out: &buffer{}, done: make(chan struct{})}
	c.cmd.Stdout, c.cmd.Stderr = c.out, c.out
	c.cmd.WaitDelay = time.Second
	in, err := c.cmd.StdinPipe()
	must(t, err)
	c.in = in
	must(t, c.cmd.Start())
	go func() {
		defer close(c.done)
		c.cmd.Wait()
	}()
	t.Cleanup(func() {
		c.cmd.Process.Kill()
		<-c.done
	})
	return c
}

// say types a line.
func (c *conversation) say(t testing.TB, format string, args ...any) {
	t.Helper()
	_, err := fmt.Fprintf(c.in, format+"\r\n", args...)
	must(t, err)
}

// expect waits for a match behind everything matched before and returns it with
// its groups.
func (c *conversation) expect(t testing.TB, pattern string) []string {
	t.Helper()
	re := regexp.MustCompile(pattern)
	var found []string
	if !becomes(30*time.Second, func() bool {
		text := c.out.String()[c.seen:]
		loc := re.FindStringSubmatchIndex(text)
		if loc == nil {
			return false
		}
		found = re.FindStringSubmatch(text)
		c.seen += loc[1]
		return true
	}) {
		t.Fatalf("%s: no %q in:\n%s", filepath.Base(c.cmd.Path), pattern, tail(c.out.String(), 25))
	}
	return found
}

// ended waits until the client has exited because the server closed.
func (c *conversation) ended(t testing.TB) {
	t.Helper()
	select {
	case <-c.done:
	case <-time.After(20 * time.Second):
		t.Fatalf("%s does not end:\n%s", filepath.Base(c.cmd.Path), tail(c.out.String(), 25))
	}
}
