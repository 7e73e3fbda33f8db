package integration

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// lab is what all tests of this run share: one directory, one CA, one syslog
// receiver, one series of loopback addresses.
var lab struct {
	dir    string // short (unix sockets end at 107 octets) and open to every user
	repo   string // the module's root
	ca     *authority
	syslog *syslogReceiver
	hosts  atomic.Int32
	// watchdog is the stdin of the watchdog process: our death closes it, and
	// so would the garbage collector if it were not kept here.
	watchdog io.Closer
}

// requirements are the programs without which nothing here can run.
var requirements = []string{
	"/usr/lib/cyrus/bin/master", "/usr/lib/cyrus/bin/imapd", "/usr/lib/cyrus/bin/pop3d",
	"/usr/lib/cyrus/bin/timsieved", "/usr/lib/cyrus/bin/lmtpd", "/usr/lib/cyrus/bin/sync_server", "/usr/lib/cyrus/bin/sync_client",
	"/usr/lib/cyrus/bin/imtest", "/usr/lib/dovecot/imap", "/usr/lib/dovecot/pop3", "/usr/lib/dovecot/managesieve",
	"/usr/lib/dovecot/lmtp", "/usr/lib/postfix/sbin/master", "postqueue", "postsuper", "swaks",
	"/usr/bin/doveconf", "saslpasswd2", "setpriv", "unshare", "curl", "mbsync", "sieve-connect", "openssl",
	"perl", "ssh", sshdProgram,
}

func TestMain(m *testing.M) { os.Exit(run(m)) }

// run sets the lab up, runs the tests and leaves nothing behind. A watchdog
// process does the same where this process dies by a timeout or a panic.
func run(m *testing.M) int {
	flag.Parse()
	if err := setUp(); err != nil {
		fmt.Fprintln(os.Stderr, "integration:", err)
		return 1
	}
	code := m.Run()
	if left := tearDown(); len(left) > 0 {
		fmt.Fprintln(os.Stderr, "integration: FAIL: these processes outlived their test:", left)
		code = max(code, 1)
	}
	return code
}

func setUp() error {
	if os.Geteuid() != 0 {
		return errors.New("must run as root, for the standard ports and the servers' users: make integration")
	}
	for _, program := range requirements {
		if _, err := exec.LookPath(program); err != nil {
			return fmt.Errorf("%w; install it with: make deps", err)
		}
	}
	wd, err := os.Getwd()
	if err != nil {
		return err
	}
	lab.repo = filepath.Dir(wd)
	if lab.dir, err = os.MkdirTemp("", "ph"); err != nil {
		return err
	}
	if err = os.Chmod(lab.dir, 0o755); err != nil {
		return err
	}
	if err = startWatchdog(lab.dir); err != nil {
		return err
	}
	if lab.ca, err = newAuthority(filepath.Join(lab.dir, "ca")); err != nil {
		return err
	}
	lab.syslog, err = listenSyslog(lab.dir)
	return err
}

// tearDown ends what the tests left running, names it, and removes the lab.
func tearDown() (left []string) {
	for _, p := range processesOf(lab.dir) {
		left = append(left, fmt.Sprintf("%d (%s)", p.pid, p.command))
		syscall.Kill(p.pid, syscall.SIGKILL)
	}
	lab.syslog.close()
	if os.Getenv("KEEP_LAB") != "" {
		fmt.Fprintln(os.Stderr, "integration: kept", lab.dir)
		return left
	}
	os.RemoveAll(lab.dir)
	return left
}

// startWatchdog starts a shell that outlives this process by a moment: when
// its stdin ends, whatever still carries the lab's directory in its command
// line is killed by its id and the directory is removed.
func startWatchdog(dir string) error {
	const script = `cat >/dev/null
		for p in /proc/[0-9]*; do
			[ "${p#/proc/}" != "$$" ] && tr '\0' ' ' <"$p/cmdline" 2>/dev/null | grep -qF "$1/" && kill -9 "${p#/proc/}"
		done
		[ -n "$KEEP_LAB" ] || rm -rf "$1"`
	cmd := exec.Command("sh", "-c", script, "watchdog", dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // survives Ctrl-C
	var err error
	if lab.watchdog, err = cmd.StdinPipe(); err != nil {
		return err
	}
	return cmd.Start()
}

// nextHost returns an address of 127/8 that no other instance of this run and
// no other run on this machine uses: 13 bits of it come from our process id, and
// there is room for 1000 instances behind them.
func nextHost() string {
	pid, n := os.Getpid(), int(lab.hosts.Add(1))
	if n >= 4*250 {
		panic("more than 999 instances in one run")
	}
	return fmt.Sprintf("127.%d.%d.%d", 64+pid%128, pid/128%64*4+n/250, 1+n%250)
}

// newDir makes a directory in the lab that any user may enter.
func newDir(t testing.TB, prefix string) string {
	t.Helper()
	dir, err := os.MkdirTemp(lab.dir, prefix)
	if err == nil {
		err = os.Chmod(dir, 0o755)
	}
	must(t, err)
	return dir
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func writeFile(t testing.TB, path, content string) {
	t.Helper()
	must(t, os.WriteFile(path, []byte(content), 0o644))
}

func readFile(t testing.TB, path string) string {
	t.Helper()
	raw, err := os.ReadFile(path)
	must(t, err)
	return string(raw)
}

// within polls until holds is true and fails the test after limit.
func within(t testing.TB, limit time.Duration, what string, holds func() bool) {
	t.Helper()
	if !becomes(limit, holds) {
		t.Fatalf("not within %v: %s", limit, what)
	}
}

// becomes polls until holds is true; false says that limit came first.
func becomes(limit time.Duration, holds func() bool) bool {
	deadline := time.After(limit)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !holds() {
		select {
		case <-tick.C:
		case <-deadline:
			return holds()
		}
	}
	return true
}

// remains fails the test if holds becomes false within span: for what must *not*
// happen, where waiting is the only way to see.
func remains(t testing.TB, span time.Duration, what string, holds func() bool) {
	t.Helper()
	if becomes(span, func() bool { return !holds() }) {
		t.Fatalf("did not remain so for %v: %s", span, what)
	}
}

// tail returns the last n lines of s, for messages of failing tests.
func tail(s string, n int) string {
	lines := strings.Split(strings.TrimRight(s, "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
