package integration

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// hookSite is one mail site whose instances the shipped hooks steer: a is on the
// driver's own host, b behind what plays ssh's part.
type hookSite struct {
	script string // posthouse-cyrus or posthouse-dovecot
	dir    string
	config string // the driver's
	table  string // what `posthouse roles -o json` would print
	number int    // of the switch; the epoch goes with it
}

// hookEnd is how one call of a hook ended.
type hookEnd struct {
	code int
	said string
	took time.Duration
}

func (e hookEnd) String() string {
	return fmt.Sprintf("exit status %d after %v:\n%s", e.code, e.took.Round(time.Millisecond), e.said)
}

// playsSSH runs what authorized_keys would: the forced command, with the request
// in the environment. What runs there does not end with the client. As long as the
// file `down` exists, its host is not reached; with `hangs` it does not answer.
const playsSSH = `#!/bin/sh
[ ! -e $DIR/down ] || exit 255
while [ -e $DIR/hangs ]; do sleep 0.02; done
patient=
case $2 in "promote "*) patient=$DIR/patient ;; esac
SSH_ORIGINAL_COMMAND=$2 exec setsid --fork --wait $patient $SCRIPT -c $DIR/remote.conf --remote
`

// patient hangs in the way of a hook, or of a promotion's part on another host: the
// file hang.STEP (hang.remote) makes the next call hang before it has done anything,
// as long as it exists as hangs.STEP then. What it does after that is in said.STEP.
const patient = `#!/bin/sh
for step; do :; done
step=${step#--}
mv $DIR/hang.$step $DIR/hangs.$step 2>/dev/null || exec "$@"
while [ -e $DIR/hangs.$step ]; do sleep 0.02; done
"$@" >$DIR/saying.$step 2>&1
echo "exit status $?" >>$DIR/saying.$step
mv $DIR/saying.$step $DIR/said.$step
`

// playsSystemd starts an instance as its unit does: what ends the caller does not end
// it. As long as the file `slow` exists, it takes its time; with `slow.master` only the start of a master does.
const playsSystemd = `#!/bin/sh
while [ -e $DIR/slow ] || { [ -e $DIR/slow.master ] && grep -q master $DIR/state-$2/$1.ticket; }; do sleep 0.02; done
setsid $SYSLOG $SCRIPT -c $DIR/$2.conf run "$1" </dev/null >>$DIR/starts 2>&1 &
until [ "$session" = $! ]; do read -r pid name state parent group session rest </proc/$!/stat || exit; done
`

// steered is a hook that the test can hold before its work, or let fail after it.
const steered = `#!/bin/sh
while [ -e $0.$3.waits ]; do touch $0.$3.came; sleep 0.02; done
$SCRIPT "$@" || exit
echo $3 >>$0.ran
[ ! -e $0.$3.fails ]
`

// steer puts the test between posthouse and the script.
func (s *hookSite) steer(t testing.TB) {
	t.Helper()
	path := filepath.Join(s.dir, "steered")
	must(t, os.WriteFile(path, []byte(strings.ReplaceAll(steered, "$SCRIPT", s.script)), 0o755))
	s.script = path
}

// fails lets a step fail, if it is not empty, until mend is called.
func (s *hookSite) fails(t testing.TB, step string) (mend func()) {
	t.Helper()
	if step == "" {
		return func() {}
	}
	path := s.script + "." + step + ".fails"
	writeFile(t, path, "")
	return func() { must(t, os.Remove(path)) }
}

// holds keeps a step from its work; await waits until it is to begin, and release
// lets it.
func (s *hookSite) holds(t testing.TB, step string) (await, release func()) {
	t.Helper()
	path := s.script + "." + step
	os.Remove(path + ".came")
	writeFile(t, path+".waits", "")
	await = func() {
		t.Helper()
		within(t, 30*time.Second, step+" is asked for", func() bool {
			_, err := os.Stat(path + ".came")
			return err == nil
		})
	}
	return await, func() { must(t, os.Remove(path+".waits")) }
}

// newHookSite writes the configuration of both hosts. dirs are the instances'
// directories, extra more lines.
func newHookSite(t testing.TB, script, adir, bdir, extra string) *hookSite {
	t.Helper()
	dir := newDir(t, "hooks-")
	s := &hookSite{script: filepath.Join(lab.repo, "deploy", script), dir: dir, config: filepath.Join(dir, "local.conf"),
		table: filepath.Join(dir, "table")}
	expand := strings.NewReplacer("$DIR", dir, "$SCRIPT", s.script, "$SYSLOG", shellWords(lab.syslog.command()))
	for name, content := range map[string]string{"ssh": playsSSH, "systemctl": playsSystemd, "patient": patient} {
		must(t, os.WriteFile(filepath.Join(dir, name), []byte(expand.Replace(content)), 0o755))
	}
	const common = "ssh=$DIR/ssh\nask=cat $DIR/table\nask_for=0\nstate=$DIR/state-$HERE\nlimit=8\nstart=$DIR/systemctl % $HERE\n" +
		"a.dir=$A\na.peer=b\na.roles=ma01\nb.dir=$B\nb.peer=a\nb.roles=ma01\n"
	for here, host := range map[string]string{"local": "b.host=root@there\n", "remote": "a.host=root@here\n"} {
		expand := strings.NewReplacer("$DIR", dir, "$A", adir, "$B", bdir, "$HERE", here)
		writeFile(t, filepath.Join(dir, here+".conf"), expand.Replace("# of the test\n\n"+common+host+extra))
	}
	s.tableSays(t, "a", "open")
	return s
}

func shellWords(argv []string) string {
	for i, word := range argv {
		argv[i] = "'" + strings.ReplaceAll(word, "'", `'\''`) + "'"
	}
	return strings.Join(argv, " ")
}

func (s *hookSite) tableSays(t testing.TB, active, phase string) {
	t.Helper()
	writeFile(t, s.table, fmt.Sprintf(`[{"role":"ma00","active":"x","phase":"open","in_doubt":false},
		{"role":"ma01","active":%q,"phase":%q,"epoch":7,"in_doubt":false}]`, active, phase))
}

// boot starts an instance as its host does when it comes up: without a hook.
func (s *hookSite) boot(t testing.TB, name string) {
	t.Helper()
	here := map[string]string{"a": "local", "b": "remote"}[name]
	if out, err := runTool(t, 10*time.Second, nil, filepath.Join(s.dir, "systemctl"), name, here); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// call is one call of posthouse: step of the switch with this number, by its
// driver number attempt. users are those with a stay; nil: nobody knows who.
type call struct {
	step            string
	from, to        string
	number, attempt int
	users           []string
	epoch           int // 0: it goes with the number
}

func (s *hookSite) call(t testing.TB, c call) hookEnd {
	t.Helper()
	seen := ""
	if c.users != nil {
		seen = filepath.Join(newDir(t, "seen"), "users")
		writeFile(t, seen, strings.Join(append(c.users, ""), "\n"))
	}
	epoch := c.epoch
	if epoch == 0 {
		epoch = 100 + c.number
	}
	cmd := exec.Command(s.script, "-c", s.config, c.step)
	cmd.Env = append(os.Environ(), "POSTHOUSE_ROLE=ma01", "POSTHOUSE_FROM="+c.from, "POSTHOUSE_TO="+c.to,
		fmt.Sprint("POSTHOUSE_SWITCH=", c.number), fmt.Sprint("POSTHOUSE_EPOCH=", epoch), "POSTHOUSE_STEP="+c.step,
		fmt.Sprint("POSTHOUSE_ATTEMPT=", c.attempt), "POSTHOUSE_USERS="+seen)
	cmd.WaitDelay = time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // as posthouse does
	began := time.Now()
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Errorf("%s: %v", c.step, err)
	}
	return hookEnd{cmd.ProcessState.ExitCode(), string(out), time.Since(began)}
}

// must asserts that a call ends with this exit status and says each of words.
func (s *hookSite) must(t testing.TB, code int, c call, words ...string) hookEnd {
	t.Helper()
	end := s.call(t, c)
	end.must(t, code, c, words...)
	return end
}

// finally is must, for a call that may have to be made again: a connection of the
// test's own may still be there.
func (s *hookSite) finally(t testing.TB, code int, c call, words ...string) hookEnd {
	t.Helper()
	var end hookEnd
	becomes(10*time.Second, func() bool {
		end = s.call(t, c)
		return end.code != 75
	})
	end.must(t, code, c, words...)
	return end
}

func (e hookEnd) must(t testing.TB, code int, c call, words ...string) {
	t.Helper()
	if e.code != code {
		t.Fatalf("%+v should have ended with %d: %v", c, code, e)
	}
	for _, word := range words {
		if !strings.Contains(e.said, word) {
			t.Fatalf("%+v does not say %q: %v", c, word, e)
		}
	}
}

// change is a whole switch by hand. It returns what each hook took. then, if not
// nil, is called after demote.
func (s *hookSite) change(t testing.TB, from, to string, users []string, then func()) map[string]time.Duration {
	t.Helper()
	s.number++
	took := map[string]time.Duration{}
	for _, step := range []string{"prove", "demote", "catch_up", "promote"} {
		c := call{step: step, from: from, to: to, number: s.number, attempt: 1, users: users}
		took[step] = s.finally(t, 0, c).took
		if step == "demote" && then != nil {
			then()
		}
	}
	s.tableSays(t, to, "open")
	return took
}

// watchClosed tries the services of users and of mail over and over; the call of
// stopped ends that and returns the ports that took a connection.
func watchClosed(host string) (stopped func() []string) {
	quit, open := make(chan struct{}), make(chan []string, 1)
	go func() {
		var found []string
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for {
			for _, port := range []string{":143", ":993", ":110", ":4190", ":24"} {
				if accepts(host + port) {
					found = append(found, port)
				}
			}
			select {
			case <-quit:
				open <- found
				return
			case <-tick.C:
			}
		}
	}()
	return func() []string { close(quit); return <-open }
}

// deliverMany delivers n messages for each user by LMTP.
func deliverMany(t testing.TB, address string, n int, users ...string) {
	t.Helper()
	l := mustDialLMTP(t, address)
	defer l.Close()
	for i := range n {
		subject := fmt.Sprintf("%d at %d", i, time.Now().UnixNano())
		replies, err := l.deliver("a@example.org", users, "Subject: "+subject+"\r\n\r\n"+subject+"\r\n")
		must(t, err)
		for _, r := range replies {
			if !r.accepted() {
				t.Fatalf("LMTP: %v", r)
			}
		}
	}
}

// logTook prints what the hooks of several switches took.
func logTook(t testing.TB, took map[string][]time.Duration) {
	sum := time.Duration(0)
	for _, step := range []string{"prove", "demote", "catch_up", "promote"} {
		slices.Sort(took[step])
		median := took[step][len(took[step])/2]
		sum += median
		t.Logf("%-8s median %v, longest %v", step, median.Round(time.Millisecond), slices.Max(took[step]).Round(time.Millisecond))
	}
	t.Logf("together %v", sum.Round(time.Millisecond))
}

// TestHookScripts: what runs as root on other people's mail servers has been read
// by a critic.
func TestHookScripts(t *testing.T) {
	t.Parallel()
	for _, script := range []string{"cyrus/posthouse-cyrus", "dovecot/posthouse-dovecot"} {
		out, err := runTool(t, time.Minute, nil, "shellcheck", "-x", "-s", "sh", filepath.Join(lab.repo, "deploy", script))
		if err != nil {
			t.Errorf("%s: %v\n%s", script, err, out)
		}
	}
}
