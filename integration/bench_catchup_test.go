//go:build bench

package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// TestBenchCatchUp: safety 24. All users of a role are compared before HOLD, on a
// pair of real Dovecot servers; in HOLD only those who had a stay since, so that the
// time in HOLD does not depend on the number of users. The sizes are in
// POSTHOUSE_CATCHUP_USERS, "440 4400" by default:
//
//	POSTHOUSE_CATCHUP_USERS="440 4400 44000" go test -tags bench -count=1 -v -timeout 60m -run TestBenchCatchUp ./integration
//
// With 44 000 users TMPDIR needs 3 GB and 1.1 million inodes.
func TestBenchCatchUp(t *testing.T) {
	sizes := os.Getenv("POSTHOUSE_CATCHUP_USERS")
	if sizes == "" {
		sizes = "440 4400"
	}
	t.Run("some of 440 differ", func(t *testing.T) { someDiffer(t, 440) })
	var table strings.Builder
	for _, size := range strings.Fields(sizes) {
		n, err := strconv.Atoi(size)
		must(t, err)
		t.Run(size+" users", func(t *testing.T) { table.WriteString(compareMany(t, n).String()) })
	}
	t.Logf("%s%s", catchUpHead, &table)
}

// manyUsers is a role of many users on two Dovecot servers, and one frontend. b gets
// what a has by the hook catch_up only, and only those users whom the hook is told of.
type manyUsers struct {
	*posthouse
	users   []string
	a, b    *dovecot
	stalled string // while this file is there the hook does nothing
}

// quickDovecot keeps the processes of a login for the next one, and writes its log
// with the time to the microsecond.
const quickDovecot = `
log_timestamp = "%Y-%m-%d %H:%M:%S.%{usecs} "
service imap-login {
  service_count = 0
  process_min_avail = 2
  inet_listener replica {
    port = 1143
  }
}
service imap {
  service_count = 1000
  process_min_avail = 8
  user = nobody
}
`

// newManyUsers starts both servers with the same mail, and the frontend. The table is
// new: anybody's mail may have changed.
func newManyUsers(t *testing.T, n int) *manyUsers {
	t.Helper()
	m := &manyUsers{a: newDovecot(t, quickDovecot), b: newDovecot(t, quickDovecot)}
	for i := range n {
		m.users = append(m.users, fmt.Sprintf("u%06d", i+1))
	}
	m.fill(t)
	s := newSite(t, m.a.lean(), m.b.lean(), m.users...)
	s.fast = true
	m.stalled = filepath.Join(s.dir, "stalled")
	hook := filepath.Join(s.dir, "catch_up")
	must(t, os.WriteFile(hook, []byte(strings.NewReplacer("$STALLED", m.stalled, "$MAIL", m.b.mailDir(), "$CONF", filepath.Join(m.a.dir, "dovecot.conf"),
		"$DOVEADM", filepath.Join(filepath.Dir(dovecotProgram(t)), "..", "bin", "doveadm")).Replace(backupHook)), 0o755))
	s.hooks = fmt.Sprintf(", scope: role, hooks: {catch_up: [%s]}, catch_up: {type: imap, parallel: 8, rate: 0}", hook)
	m.posthouse = startFrontend(t, s)
	return m
}

// backupHook is a catch_up hook. That it is told of everybody is a failure.
const backupHook = `#!/bin/sh
[ -n "$POSTHOUSE_USERS" ] || { echo "told of everybody"; exit 1; }
[ -e $STALLED ] && exit 0
xargs -r -n 1 -P 2 sh -c '$DOVEADM -c $CONF backup -u "$0" "maildir:$MAIL/$0/Maildir"' <"$POSTHOUSE_USERS" || exit 1
echo "users brought over: $(wc -l <"$POSTHOUSE_USERS")"
`

// lean is the backend as newManyUsers has it: without TLS, and compared at an
// address of its own without the scripts, which nobody has.
func (d *dovecot) lean() backend {
	be := d.backend()
	be.plain = true
	be.done += fmt.Sprintf(", replica: {imap: %q}", d.host+":1143") // done is the last key of a backend
	return be
}

// fill gives each user an INBOX with one message, the same on both servers.
func (m *manyUsers) fill(t *testing.T) {
	t.Helper()
	const nobody, nogroup = 65534, 65534
	for i, user := range m.users {
		message := fmt.Sprintf("Subject: for %s\r\nFrom: a@example.org\r\n\r\nhello\r\n", user)
		name := fmt.Sprintf("1700000000.M%dP1.lab,S=%d,W=%d", i, len(message), len(message))
		for _, d := range []*dovecot{m.a, m.b} {
			home := filepath.Join(d.mailDir(), user)
			inbox := filepath.Join(home, "Maildir")
			for _, dir := range []string{home, inbox, filepath.Join(inbox, "cur"), filepath.Join(inbox, "new"), filepath.Join(inbox, "tmp")} {
				must(t, os.Mkdir(dir, 0o700))
				must(t, os.Chown(dir, nobody, nogroup))
			}
			for path, content := range map[string]string{
				filepath.Join("cur", name+":2,S"): message,
				"dovecot-uidlist":                 fmt.Sprintf("3 V%d N2 G%032x\n1 :%s\n", 1_700_000_000+i, i+1, name),
			} {
				path = filepath.Join(inbox, path)
				must(t, os.WriteFile(path, []byte(content), 0o600))
				must(t, os.Chown(path, nobody, nogroup))
			}
		}
	}
}

// switchView is one switch in `posthouse switches`.
type switchView struct {
	Compared string `json:"compared"`
	Steps    []struct {
		Phase string    `json:"phase"`
		At    time.Time `json:"at"`
	} `json:"steps"`
	Runs []struct {
		Began  time.Time     `json:"began"`
		Took   time.Duration `json:"took_ns"`
		Output string        `json:"output"`
	} `json:"runs"`
}

// at is when the switch came to a phase for the first time; zero if it did not.
func (v switchView) at(phase string) time.Time {
	for _, step := range v.Steps {
		if step.Phase == phase {
			return step.At
		}
	}
	return time.Time{}
}

// lastSwitch is the last one that has ended.
func (p *posthouse) lastSwitch(t *testing.T) switchView {
	t.Helper()
	var all struct{ Ended []switchView }
	p.ask(t, &all, "switches")
	return all.Ended[len(all.Ended)-1]
}

// logins are those in the server's log, by user.
func (d *dovecot) logins(t *testing.T) map[string][]time.Time {
	t.Helper()
	all := map[string][]time.Time{}
	for _, line := range dovecotLine.FindAllStringSubmatch(d.logText(), -1) {
		if login := dovecotLogin.FindStringSubmatch(line[3]); login != nil {
			at, err := time.ParseInLocation("2006-01-02 15:04:05.000000", line[1], time.Local)
			must(t, err)
			all[login[1]] = append(all[login[1]], at)
		}
	}
	return all
}

// loggedInSince are the users with a login at or after a moment, sorted.
func loggedInSince(logins map[string][]time.Time, moment time.Time) []string {
	var users []string
	for user, at := range logins {
		if slices.ContainsFunc(at, func(at time.Time) bool { return !at.Before(moment) }) {
			users = append(users, user)
		}
	}
	slices.Sort(users)
	return users
}

// brought is when the hook has brought over what a had.
func (m *manyUsers) brought(t *testing.T) time.Time {
	t.Helper()
	lines := m.lines(`"hook says"`, "users brought over")
	if len(lines) != 1 {
		t.Fatalf("the hook was to run once: %q", lines)
	}
	var entry struct{ TS time.Time }
	must(t, json.Unmarshal([]byte(lines[0]), &entry))
	return entry.TS
}

// catchUpFigures are one line of the bench's table.
type catchUpFigures struct {
	users                           int
	before, hold, compared, toLogin time.Duration
	inHold                          int
	peak                            int
}

const catchUpHead = "| users | comparison before HOLD | users compared in HOLD | HOLD until OPEN | of that the comparison | HOLD until the first login on b | posthouse's peak memory |\n|---|---|---|---|---|---|---|\n"

func (f catchUpFigures) String() string {
	short := func(d time.Duration) time.Duration { return d.Round(10 * time.Millisecond) }
	return fmt.Sprintf("| %d | %v | %d | %v | %v | %v | %d MB |\n", f.users, f.before.Round(100*time.Millisecond), f.inHold,
		short(f.hold), short(f.compared), short(f.toLogin), f.peak>>20)
}

// compareMany switches a role of n users of whom twenty have sessions while the
// others are compared. Five are inside all the time and get mail only behind their
// comparison, which has found them equal; five get mail before; ten enter meanwhile,
// and half of these leave.
func compareMany(t *testing.T, n int) catchUpFigures {
	const stays = 20
	began := time.Now()
	m := newManyUsers(t, n)
	t.Logf("%d users are there after %v, peak memory %d MB", n, time.Since(began).Round(time.Millisecond), m.peakMemory(t)>>20)
	late, inside := m.users[0], slices.Clone(m.users[1:6]) // who are compared first
	for i := 5; i < stays; i++ {
		inside = append(inside, m.users[i*n/stays])
	}
	mail := func(w *wire, user string) { must(t, w.append(10*time.Second, "INBOX", "appended for "+user)) }
	var quiet []*wire
	for _, user := range inside[:5] {
		quiet = append(quiet, m.as(t, user))
	}
	for _, user := range inside[5:10] {
		mail(m.as(t, user), user)
	}
	ended := make(chan switchResult, 1)
	go func() {
		began := time.Now()
		stdout, stderr, code := m.cliWithin(t, time.Hour, "switch", "ma01", "--to", "b")
		ended <- switchResult{code, stdout + stderr, time.Since(began)}
	}()
	within(t, 30*time.Second, "the comparison has begun", func() bool { return len(m.lines(`"comparing before HOLD"`, `"all":true`)) == 1 })
	for i, user := range inside[10:] {
		w := m.as(t, user)
		if mail(w, user); i%2 == 0 {
			_, _, err := w.imap(10*time.Second, "LOGOUT")
			must(t, err)
		}
	}
	for i, w := range quiet {
		within(t, time.Hour, inside[i]+" was compared", func() bool {
			return slices.ContainsFunc(strings.Split(m.b.logText(), "\n"), func(line string) bool {
				return strings.Contains(line, "imap("+inside[i]+")") && strings.Contains(line, "Logged out")
			})
		})
		mail(w, inside[i])
	}
	if len(m.lines(`"compared before HOLD"`)) > 0 {
		t.Fatal("the comparison has ended before everybody was inside: there are too few users")
	}
	within(t, time.Hour, "the role is held", func() bool { return len(m.told(t, "role held")) > 0 || len(ended) > 0 })
	m.as(t, late)
	entered := time.Now()
	mustOpen(t, <-ended)
	m.mustBeOn(t, "b")
	sw := m.lastSwitch(t)

	run := sw.Runs[len(sw.Runs)-1]
	f := catchUpFigures{users: n, before: sw.at("hold").Sub(sw.at("preflight")), hold: sw.at("open").Sub(sw.at("hold")),
		compared: run.Began.Add(run.Took).Sub(m.brought(t)), toLogin: entered.Sub(sw.at("hold")), peak: m.peakMemory(t)}
	t.Logf("before HOLD: %s; in HOLD, in %v: %s", sw.Compared, run.Took, run.Output)

	// By b's log: before HOLD everybody was compared; in HOLD those who had a stay
	// since, all of them and nobody else.
	slices.Sort(inside)
	var inHold []string
	becomes(10*time.Second, func() bool { // the log comes a little later
		inHold = loggedInSince(m.b.logins(t), sw.at("hold"))
		return len(inHold) > stays && slices.Contains(inHold, late)
	})
	if !slices.Contains(inHold, late) {
		t.Errorf("the first login behind HOLD is not on b")
	}
	inHold = slices.DeleteFunc(inHold, func(user string) bool { return user == late })
	if f.inHold = len(inHold); !slices.Equal(inHold, inside) {
		t.Errorf("compared in HOLD: %d users, %.20q; want those who had a stay since, %q", len(inHold), inHold, inside)
	}
	if !strings.Contains(run.Output, fmt.Sprintf("users compared: %d equal, 0 not", stays)) {
		t.Errorf("the history says of HOLD: %s", run.Output)
	}
	for _, d := range []*dovecot{m.a, m.b} {
		logins := d.logins(t)
		for _, user := range m.users {
			at := logins[user]
			if len(at) == 0 || !at[0].Before(sw.at("hold")) {
				t.Fatalf("%s: %s was not compared before HOLD: %v", d.name, user, at)
			}
			if d == m.b && len(at) > 1 && user != late && !slices.Contains(inside, user) {
				t.Errorf("%s was compared %d times", user, len(at))
			}
		}
	}
	for _, user := range inside {
		has, err := m.b.as(t, user).subjects("INBOX")
		must(t, err)
		if want := []string{"for " + user, "appended for " + user}; !slices.Equal(has, want) {
			t.Errorf("%s has %q on b, want %q", user, has, want)
		}
	}
	return f
}

// someDiffer is the control. Of n users one cannot be compared, and is named: nobody
// waits. 101 differ, more than may be left for HOLD: nobody waits. One differs, and is
// named: HOLD ends without b. None differs.
func someDiffer(t *testing.T, n int) {
	m := newManyUsers(t, n)
	writeFile(t, m.stalled, "")
	inbox := filepath.Join(m.b.mailDir(), m.users[n/3], "Maildir")
	must(t, os.Chmod(inbox, 0))
	mustFail(t, m.switchTo(t, "b"), "preflight", "could not be compared", m.users[n/3], fmt.Sprintf("%d equal, 1 not", n-1))
	must(t, os.Chmod(inbox, 0o700))
	for user, at := range m.b.logins(t) {
		if len(at) > 1 && user != m.users[n/3] {
			t.Fatalf("%s is equal, and was compared %d times", user, len(at))
		}
	}

	flag := func(change string, users ...string) {
		for _, user := range users {
			w := m.b.as(t, user)
			w.ok(t, "SELECT INBOX", "STORE 1 "+change+` (\Flagged)`, "LOGOUT")
		}
	}
	differ := m.users[n/2 : n/2+101]
	flag("+FLAGS", differ...)
	mustFail(t, m.switchTo(t, "b"), "preflight", "users that differ: 101", differ[0], fmt.Sprintf("%d equal, 101 not", n-101))
	if held := m.told(t, "role held"); len(held) > 0 {
		t.Errorf("101 users differ, and the role was held at %v", held)
	}

	flag("-FLAGS", differ[1:]...)
	mustFail(t, m.switchTo(t, "b"), "catch_up", "users that differ: 1,", differ[0], fmt.Sprintf("%d equal, 1 not", n-1), "those are compared again in HOLD")
	m.mustBeOn(t, "a")

	must(t, os.Remove(m.stalled))
	mustOpen(t, m.switchTo(t, "b"))
	m.mustBeOn(t, "b")
	untagged, _, err := func() ([]string, string, error) {
		w := m.b.as(t, differ[0])
		w.ok(t, "EXAMINE INBOX")
		return w.imap(5*time.Second, "FETCH 1 FLAGS")
	}()
	must(t, err)
	if strings.Contains(strings.Join(untagged, " "), `\Flagged`) {
		t.Errorf("b opened, and is not what a was: %q", untagged)
	}
}
