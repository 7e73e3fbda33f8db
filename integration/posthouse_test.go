package integration

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// posthouse is one frontend: the real binary with the configuration that the
// test wrote.
type posthouse struct {
	*daemon
	site *site
	name string // in its certificate
	host string
	conf string
}

// site is what the frontends of one installation have in common. The zero
// values of limits and auth mean posthouse's defaults and the users' file.
type site struct {
	dir      string
	backends map[string]backend
	users    map[string]string // user → role
	members  string            // of role ma01: "a, b"
	active   string            // seeds an empty store
	auth     string            // YAML; empty: a file with everybody's password
	limits   string            // YAML; empty: the defaults
	hooks    string            // of ma01, YAML after its active; empty: none
	roles    map[string]string // further roles → YAML
	doors    []string          // further listeners, YAML; $HOST and $DIR are the frontend's
	more     []string          // further sections, YAML
	store    string            // YAML; empty: one state directory for all frontends
	fast     bool              // the binary without the race detector, for what measures memory
}

// backend is a line of the backends section.
type backend struct {
	host, cert string
	style      string // authzid, master-user, replay
	done       string // eof, logout
	lmtpTLS    string // of its LMTP service; empty: as the others
	plain      bool   // no TLS
}

// backend: lmtpd -a knows no STARTTLS.
func (c *cyrus) backend() backend {
	return backend{c.host, c.certName(), "authzid", "eof", "off", false}
}
func (d *dovecot) backend() backend {
	return backend{d.host, d.cert, "master-user", "logout", "", false}
}

// newSite describes an installation with one role, ma01, on a and b; a is
// active. All users have the same password.
func newSite(t testing.TB, a, b backend, users ...string) *site {
	t.Helper()
	s := &site{dir: newDir(t, "site"), backends: map[string]backend{"a": a, "b": b}, users: map[string]string{},
		members: "a, b", active: "a"}
	for _, user := range users {
		s.users[user] = "ma01"
	}
	return s
}

func (s *site) stateDir() string { return filepath.Join(s.dir, "state") }

// write writes the site's common files: users, roles, the proxy's password.
func (s *site) write(t testing.TB) {
	t.Helper()
	must(t, os.MkdirAll(s.stateDir(), 0o700))
	var passwd, roles strings.Builder
	for _, user := range slices.Sorted(maps.Keys(s.users)) {
		fmt.Fprintf(&passwd, "%s:{PLAIN}%s\n", user, password)
		fmt.Fprintf(&roles, "%s: %s\n", user, s.users[user])
	}
	must(t, os.WriteFile(filepath.Join(s.dir, "users.passwd"), []byte(passwd.String()), 0o600))
	writeFile(t, filepath.Join(s.dir, "users.map"), roles.String())
	must(t, os.WriteFile(filepath.Join(s.dir, "proxy.secret"), []byte(password+"\n"), 0o600))
}

// yaml is the configuration of one frontend.
func (s *site) yaml(p *posthouse, dir string) string {
	var b strings.Builder
	auth := s.auth
	if auth == "" {
		auth = "{type: file, path: " + filepath.Join(s.dir, "users.passwd") + "}"
	}
	state, store := s.stateDir(), "{type: file}"
	if s.store != "" {
		state, store = filepath.Join(dir, "state"), s.store
	}
	fmt.Fprintf(&b, "hostname: %s\nstate_dir: %s\nstore: %s\nlisteners:\n", p.name, state, store)
	for _, door := range slices.Sorted(maps.Keys(p.service().at)) {
		protocol, tls, _ := strings.Cut(door, "/")
		fmt.Fprintf(&b, "  - {protocol: %s, address: %q, tls: %s}\n", protocol, p.service().at[door], tls)
	}
	for _, door := range s.doors {
		fmt.Fprintf(&b, "  - %s\n", strings.NewReplacer("$HOST", p.host, "$DIR", dir).Replace(door))
	}
	fmt.Fprintf(&b, "tls:\n  certificates:\n    - {cert: %s/cert.pem, key: %s/key.pem}\n", dir, dir)
	fmt.Fprintf(&b, "auth:\n  - %s\ndirectory:\n  - {type: file, path: %s}\nbackends:\n", auth, filepath.Join(s.dir, "users.map"))
	for _, name := range slices.Sorted(maps.Keys(s.backends)) {
		be := s.backends[name]
		login := fmt.Sprintf("{user: proxy, password_file: %s, style: %s}", filepath.Join(s.dir, "proxy.secret"), be.style)
		if be.style == "replay" {
			login = "{style: replay}"
		}
		lmtpTLS := ""
		if be.lmtpTLS != "" {
			lmtpTLS = ", lmtp_mode: " + be.lmtpTLS
		}
		tls := fmt.Sprintf("{mode: starttls, ca: %s, server_name: %s%s}", lab.ca.file, be.cert, lmtpTLS)
		if be.plain {
			tls = "{mode: off}"
		}
		fmt.Fprintf(&b, "  %s: {imap: \"%s:143\", pop3: \"%s:110\", sieve: \"%s:4190\", lmtp: \"%s:24\",\n"+
			"      tls: %s,\n      login: %s, done: %s}\n", name, be.host, be.host, be.host, be.host, tls, login, be.done)
	}
	fmt.Fprintf(&b, "roles:\n  ma01: {members: [%s], active: %s%s}\n", s.members, s.active, s.hooks)
	for _, role := range slices.Sorted(maps.Keys(s.roles)) {
		fmt.Fprintf(&b, "  %s: %s\n", role, s.roles[role])
	}
	for _, section := range s.more {
		fmt.Fprintln(&b, section)
	}
	fmt.Fprintf(&b, "admin: {socket: %s, http: %q}\n", filepath.Join(dir, "admin.sock"), p.host+":9143")
	if s.limits != "" {
		fmt.Fprintf(&b, "limits: {%s}\n", s.limits)
	}
	b.WriteString("log: {level: info, format: json}\n")
	return b.String()
}

var frontendSerial atomic.Int32

// newFrontend lays out a frontend of s without starting it.
func newFrontend(t testing.TB, s *site) *posthouse {
	t.Helper()
	s.write(t)
	name := fmt.Sprintf("fe%d", frontendSerial.Add(1))
	dir := newDir(t, name+"-")
	p := &posthouse{site: s, name: name + ".test", host: nextHost(), conf: filepath.Join(dir, "posthouse.yaml")}
	lab.ca.issue(t, dir, p.name, p.host)
	writeFile(t, p.conf, s.yaml(p, dir))
	return p
}

// startFrontend starts a frontend of s, waits until it serves, and stops it
// cleanly at the end of the test.
func startFrontend(t testing.TB, s *site) *posthouse {
	t.Helper()
	p := newFrontend(t, s)
	p.start(t)
	p.ready(t)
	return p
}

// start starts the process; it may fail to serve.
func (p *posthouse) start(t testing.TB) {
	t.Helper()
	p.daemon = startDaemon(t, p.name, filepath.Dir(p.conf), builtPosthouse(t, p.site.fast), "serve", "-c", p.conf)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("%s's log ends:\n%s", p.name, tail(p.output.String(), 40))
			writeFile(t, filepath.Join(filepath.Dir(p.conf), "log"), p.output.String()) // for KEEP_LAB
		}
		if p.running() {
			p.stop(t)
		}
		p.checkRaces(t)
	})
}

// ready waits until the listeners accept and /readyz says so.
func (p *posthouse) ready(t testing.TB) {
	t.Helper()
	for _, address := range p.service().at {
		p.listening(t, address)
	}
	said := ""
	if !becomes(30*time.Second, func() bool {
		answer, err := http.Get("http://" + p.host + ":9143/readyz")
		if err != nil {
			said = err.Error()
			return false
		}
		defer answer.Body.Close()
		body, _ := io.ReadAll(answer.Body)
		said = string(body)
		return answer.StatusCode == http.StatusOK
	}) {
		t.Fatalf("%s is not ready: %s\n%s", p.name, said, tail(p.output.String(), 40))
	}
}

// stop ends it as an operator does, which must succeed: exit code 0.
func (p *posthouse) stop(t testing.TB) {
	t.Helper()
	p.daemon.stop(t, 30*time.Second)
	if code := p.cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("%s: exit code %d after SIGTERM\n%s", p.name, code, tail(p.output.String(), 20))
	}
	p.checkRaces(t)
}

// refuses waits until the process has ended by itself, with code 1, and
// returns what it said.
func (p *posthouse) refuses(t testing.TB) string {
	t.Helper()
	within(t, 15*time.Second, p.name+" refuses to start", func() bool { return !p.running() })
	if code := p.cmd.ProcessState.ExitCode(); code != 1 {
		t.Errorf("%s: exit code %d, want 1\n%s", p.name, code, p.output)
	}
	return p.output.String()
}

func (p *posthouse) checkRaces(t testing.TB) {
	t.Helper()
	if i := strings.Index(p.output.String(), "WARNING: DATA RACE"); i >= 0 {
		t.Errorf("%s: %s", p.name, p.output.String()[i:])
	}
}

// service is posthouse as clients reach it: every protocol, both kinds of TLS.
func (p *posthouse) service() service {
	return service{name: p.name, at: map[string]string{
		"imap/starttls": p.host + ":143", "imap/implicit": p.host + ":993",
		"pop3/starttls": p.host + ":110", "pop3/implicit": p.host + ":995",
		"sieve/starttls": p.host + ":4190", "sieve/implicit": p.host + ":5190",
	}}
}

func (p *posthouse) imap() string { return p.host + ":143" }

// as logs a user in to IMAP and keeps the connection until the test ends.
func (p *posthouse) as(t testing.TB, user string) *wire {
	t.Helper()
	w, err := imapLogin(p.imap(), p.name, user, password, 30*time.Second)
	must(t, err)
	return w.keep(t)
}

// lines returns p's log lines that contain all of parts.
func (p *posthouse) lines(parts ...string) []string {
	var found []string
	for line := range strings.Lines(p.output.String()) {
		if !slices.ContainsFunc(parts, func(part string) bool { return !strings.Contains(line, part) }) {
			found = append(found, line)
		}
	}
	return found
}

// cli runs an operator's verb, with -o json, and returns stdout, stderr and the
// exit code.
func (p *posthouse) cli(t testing.TB, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	return p.cliWithin(t, 60*time.Second, args...)
}

func (p *posthouse) cliWithin(t testing.TB, limit time.Duration, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	cmd := exec.Command(builtPosthouse(t, true), append(args, "-o", "json", "-c", p.conf)...)
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	must(t, cmd.Start())
	killer := time.AfterFunc(limit, func() { cmd.Process.Kill() })
	defer killer.Stop()
	cmd.Wait()
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// ask runs a verb that must succeed and decodes its JSON into answer.
func (p *posthouse) ask(t testing.TB, answer any, args ...string) {
	t.Helper()
	stdout, stderr, code := p.cli(t, args...)
	if code != 0 {
		t.Fatalf("posthouse %s: exit code %d: %s%s", strings.Join(args, " "), code, stdout, stderr)
	}
	if err := json.Unmarshal([]byte(stdout), answer); err != nil {
		t.Fatalf("posthouse %s -o json: %v: %s", strings.Join(args, " "), err, stdout)
	}
}

// builtPosthouse returns the path of the binary: with the race detector, or
// without (fast). make has built both; `go test` alone builds them here, once.
func builtPosthouse(t testing.TB, fast bool) string {
	t.Helper()
	buildOnce.Do(func() {
		if builtDir = os.Getenv("POSTHOUSE_BUILT"); builtDir != "" {
			return
		}
		builtDir = filepath.Join(lab.dir, "bin")
		for _, args := range [][]string{{"-race", "-o", "posthouse-race"}, {"-o", "posthouse"}} {
			args[len(args)-1] = filepath.Join(builtDir, args[len(args)-1])
			cmd := exec.Command("go", append(append([]string{"build"}, args...), "./cmd/posthouse")...)
			cmd.Dir = lab.repo
			if out, err := cmd.CombinedOutput(); err != nil {
				buildError = fmt.Errorf("go build: %w\n%s", err, out)
				return
			}
		}
	})
	must(t, buildError)
	if fast {
		return filepath.Join(builtDir, "posthouse")
	}
	return filepath.Join(builtDir, "posthouse-race")
}

var (
	buildOnce  sync.Once
	builtDir   string
	buildError error
)
