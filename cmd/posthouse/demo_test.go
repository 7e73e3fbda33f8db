package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/emersion/go-imap/v2"
	"github.com/emersion/go-imap/v2/imapclient"

	"github.com/posthouse/posthouse/cmd/posthouse/internal/admin"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// running is a demo in this process.
type running struct {
	welcome       string
	starttls, tls string // addresses
	socket        string
	said          <-chan string // what it tells after the welcome; closed at its end
	ended         chan error
	stop          context.CancelFunc
}

func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "ph")
	must(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

var (
	starttlsAt = regexp.MustCompile(`starttls imap -connect (\S+)`)
	tlsAt      = regexp.MustCompile(`imaps://([^/\s]+)/`)
)

// runDemo starts the demo on free ports, with its socket in dir, and returns
// when it has said what to type.
func runDemo(ctx context.Context, dir string, linger time.Duration) (*running, error) {
	ctx, stop := context.WithCancel(ctx)
	in, out := io.Pipe()
	r := &running{socket: filepath.Join(dir, "s"), ended: make(chan error, 1), stop: stop}
	d := demo{socket: r.socket, linger: linger, program: "posthouse", out: out}
	go func() {
		err := d.run(ctx)
		out.Close()
		r.ended <- err
	}()
	lines := bufio.NewScanner(in)
	var welcome strings.Builder
	for lines.Scan() {
		welcome.WriteString(lines.Text() + "\n")
		if strings.HasSuffix(lines.Text(), "as it happens:") {
			break
		}
	}
	r.welcome = welcome.String()
	said := make(chan string, 1000) // more than a test makes it say
	go func() {
		defer close(said)
		for lines.Scan() {
			said <- lines.Text()
		}
	}()
	r.said = said
	a, b := starttlsAt.FindStringSubmatch(r.welcome), tlsAt.FindStringSubmatch(r.welcome)
	if a == nil || b == nil {
		stop()
		return nil, <-r.ended
	}
	r.starttls, r.tls = a[1], b[1]
	return r, nil
}

// hear waits until the demo says a line with all parts.
func (r *running) hear(t testing.TB, parts ...string) {
	t.Helper()
	r.hearAll(t, parts)
}

// hearAll waits until the demo has said a line for each of the lists, in any
// order, with all its parts.
func (r *running) hearAll(t testing.TB, lists ...[]string) {
	t.Helper()
	patience := time.After(20 * time.Second)
	for open := true; open && len(lists) > 0; {
		var line string
		select {
		case line, open = <-r.said:
			heard := func(parts []string) bool {
				return open && !slices.ContainsFunc(parts, func(p string) bool { return !strings.Contains(line, p) })
			}
			if i := slices.IndexFunc(lists, heard); i >= 0 {
				lists = slices.Delete(lists, i, i+1)
			}
		case <-patience:
			open = false
		}
	}
	if len(lists) > 0 {
		t.Fatalf("the demo has not said %q", lists)
	}
}

var anyCertificate = &tls.Config{InsecureSkipVerify: true}

func logIn(t testing.TB, r *running, starttls bool, user string) *imapclient.Client {
	t.Helper()
	options := &imapclient.Options{TLSConfig: anyCertificate}
	dial, address := imapclient.DialTLS, r.tls
	if starttls {
		dial, address = imapclient.DialStartTLS, r.starttls
	}
	c, err := dial(address, options)
	must(t, err)
	t.Cleanup(func() { _ = c.Close() })
	must(t, c.Login(user, demoPassword).Wait())
	return c
}

// inbox returns the subjects in a user's INBOX.
func inbox(t testing.TB, c *imapclient.Client) (subjects []string) {
	t.Helper()
	_, err := c.Select("INBOX", nil).Wait()
	must(t, err)
	all, err := c.Fetch(imap.SeqSet{{Start: 1, Stop: 0}}, &imap.FetchOptions{Envelope: true}).Collect()
	must(t, err)
	for _, m := range all {
		subjects = append(subjects, m.Envelope.Subject)
	}
	return subjects
}

// TestDemo: what its first lines promise. A user is logged in, the role is
// switched, a login waits meanwhile, and the same mail is there.
func TestDemo(t *testing.T) {
	dir := shortDir(t)
	t.Setenv("TMPDIR", t.TempDir()) // where nothing may be left
	began := time.Now()
	r, err := runDemo(t.Context(), dir, 1500*time.Millisecond)
	must(t, err)
	t.Logf("ready after %v", time.Since(began))
	alice := logIn(t, r, true, "alice")
	r.hear(t, "login", "alice", "on a")
	before := inbox(t, alice)
	if len(before) != 3 {
		t.Fatalf("alice's INBOX: %q", before)
	}

	client := admin.NewClient(r.socket)
	switched := make(chan error, 1)
	go func() {
		_, err := client.Switch(t.Context(), admin.SwitchRequest{Role: demoRole, To: "b"}, func(admin.Progress) {})
		switched <- err
	}()
	r.hear(t, "hold", "from a to b")
	waiting := logIn(t, r, false, "alice")
	// A login enters as soon as this frontend knows that the role is open, which
	// may be before the demo says so.
	r.hearAll(t, []string{"parked"}, []string{"drained"}, []string{"ack"}, []string{"opened"}, []string{"login", "alice", "on b"})
	must(t, <-switched)
	if after := inbox(t, waiting); !slices.Equal(after, before) {
		t.Errorf("INBOX on b %q, on a %q", after, before)
	}
	if err := alice.Noop().Wait(); err == nil {
		t.Error("the old session goes on")
	}
	sessions, err := client.Sessions(t.Context())
	must(t, err)
	if len(sessions) != 1 || sessions[0].Backend != "b" || sessions[0].User != "alice" {
		t.Errorf("sessions: %+v", sessions)
	}

	r.stop()
	r.hear(t, "stopped")
	must(t, <-r.ended)
	if _, err := net.Dial("tcp", r.tls); err == nil {
		t.Error("the listener is still there")
	}
	if left, _ := os.ReadDir(os.TempDir()); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	if _, err := os.Lstat(r.socket); err == nil {
		t.Error("the admin socket is still there")
	}
}

// TestDemoInterrupted: Ctrl-C is a good end, exit code 0.
func TestDemoInterrupted(t *testing.T) {
	socket := filepath.Join(shortDir(t), "s")
	// testscript.Main has put this binary into the PATH under its name.
	cmd := exec.CommandContext(t.Context(), "posthouse", "demo", "--imap", "0", "--imaps", "0", "--socket", socket)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	lines := bufio.NewScanner(out)
	last := ""
	for lines.Scan() {
		if last = lines.Text(); strings.HasSuffix(last, "as it happens:") {
			must(t, cmd.Process.Signal(os.Interrupt))
		}
	}
	must(t, cmd.Wait())
	if !strings.HasSuffix(last, "stopped") {
		t.Errorf("its last line: %q", last)
	}
}

// TestDemoPortInUse: it says which port, and what to do.
func TestDemoPortInUse(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	port := l.Addr().(*net.TCPAddr).Port
	d := demo{imap: uint16(port), socket: filepath.Join(shortDir(t), "s"), program: "posthouse", out: io.Discard}
	err = d.run(t.Context())
	if err == nil {
		t.Fatal("it ran")
	}
	for _, part := range []string{":" + strconv.Itoa(port), "in use", "--imap "} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("the message lacks %q: %v", part, err)
		}
	}
}
