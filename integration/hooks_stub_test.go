package integration

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// hookStub is an instance a of a site whose Cyrus is nothing but names: what the
// scripts decide by themselves needs no server.
type hookStub struct {
	script, dir, etc, conf string
}

func newHookStub(t testing.TB, lines string) hookStub {
	t.Helper()
	dir := newDir(t, "stub-")
	s := hookStub{filepath.Join(lab.repo, "deploy/cyrus/posthouse-cyrus"), dir, filepath.Join(dir, "etc"), filepath.Join(dir, "hooks.conf")}
	for _, sub := range []string{"etc", "conf/sync", "bin", "state"} {
		must(t, os.MkdirAll(filepath.Join(dir, sub), 0o755))
	}
	writeFile(t, filepath.Join(s.etc, "imapd.conf"), "configdirectory: "+dir+"/conf\n")
	writeFile(t, filepath.Join(s.etc, "cyrus-master.conf"), "")
	writeFile(t, filepath.Join(s.etc, "cyrus-replica.conf"), "")
	expand := strings.NewReplacer("$DIR", dir)
	writeFile(t, s.conf, expand.Replace("a.dir=$DIR/etc\na.peer=b\na.roles=ma01\nb.host=nowhere\nb.peer=a\nstate=$DIR/state\nprogram=$DIR/bin\nlimit=2\nask_for=0\n"+lines))
	s.program(t, "master", "echo becomes $*")
	return s
}

// newDovecotStub is the same for Dovecot: a replica that runs, and a doveadm that
// writes down what it was called with.
func newDovecotStub(t testing.TB) hookStub {
	t.Helper()
	s := newHookStub(t, "b.sync=nowhere\n")
	s.script = filepath.Join(lab.repo, "deploy/dovecot/posthouse-dovecot")
	writeFile(t, s.conf, readFile(t, s.conf)+"doveadm="+s.dir+"/bin/doveadm\n")
	writeFile(t, filepath.Join(s.etc, "common.conf"), "base_dir = "+s.dir+"/run\n")
	s.program(t, "doveadm", `echo "$*" >>`+s.dir+`/calls`)
	return s
}

// program gives the stub a program.
func (s hookStub) program(t testing.TB, name, script string) {
	t.Helper()
	must(t, os.WriteFile(filepath.Join(s.dir, "bin", name), []byte("#!/bin/sh\n"+script+"\n"), 0o755))
}

// run starts the instance as its host does and returns what it says.
func (s hookStub) run(t testing.TB) string {
	t.Helper()
	out, err := runTool(t, 10*time.Second, nil, s.script, "-c", s.conf, "run", "a")
	must(t, err)
	return out
}

// at runs one stage of a step on a.
func (s hookStub) at(t testing.TB, op, step string, number int) (string, error) {
	t.Helper()
	return s.give(t, "", op, step, number)
}

func (s hookStub) give(t testing.TB, input, op, step string, number int) (string, error) {
	t.Helper()
	return s.in(t, "LANG=C", strings.NewReader(input), op, step, number)
}

// in gives the stage one variable of its environment, too.
func (s hookStub) in(t testing.TB, variable string, input io.Reader, op, step string, number int) (string, error) {
	t.Helper()
	return runTool(t, 20*time.Second, input, "env", variable, s.script, "-c", s.conf, "--at", op, "a", fmt.Sprint(number), fmt.Sprint(100+number), "1", step, "ma01", "b")
}

// tryAgain says whether a stage ended with EX_TEMPFAIL.
func tryAgain(err error) bool { return err != nil && strings.Contains(err.Error(), "status 75") }

// has says whether the stub has a file.
func (s hookStub) has(name string) bool {
	_, err := os.Stat(filepath.Join(s.dir, name))
	return err == nil
}

// process runs something by the name of program, with these arguments.
func (s hookStub) process(t testing.TB, program string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("sh", append([]string{"-c", "read forever"}, args...)...)
	cmd.Args[0] = program
	stdin, err := cmd.StdinPipe()
	must(t, err)
	must(t, cmd.Start())
	t.Cleanup(func() { stdin.Close(); cmd.Process.Kill(); cmd.Wait() })
	return cmd
}

// TestHookProcesses: who looks at an instance's files is not the instance, and no
// hook ends him.
func TestHookProcesses(t *testing.T) {
	t.Parallel()
	s := newHookStub(t, "")
	lookers := []*exec.Cmd{
		s.process(t, "tail", "-f", s.etc+"/cyrus-master.conf"),
		s.process(t, "vim", s.etc+"/imapd.conf"),
		s.process(t, "master", s.etc+"/imapd.conf"),
	}
	if out, err := s.at(t, "fence", "fence", 1); err != nil || !strings.Contains(out, "no process of it is left") {
		t.Errorf("fence: %v: %s", err, out)
	}
	for _, looker := range lookers {
		if _, err := os.Stat(fmt.Sprintf("/proc/%d/exe", looker.Process.Pid)); err != nil {
			t.Errorf("%q was ended: %v", looker.Args, err)
		}
	}
	s.process(t, "vim", "-M", s.etc+"/cyrus-master.conf")
	if out, _ := s.at(t, "serves", "rejoin", 1); !strings.Contains(out, "is no master") {
		t.Errorf("what vim shows is taken for a master: %s", out)
	}
	member := s.process(t, "imapd", "-C", s.etc+"/imapd.conf")
	if out, err := s.at(t, "fence", "fence", 2); err != nil {
		t.Errorf("fence: %v: %s", err, out)
	}
	if err := member.Wait(); err == nil {
		t.Error("a process of the instance was not ended")
	}
}

// TestHookReady: a master that takes no connections has not been promoted already.
func TestHookReady(t *testing.T) {
	t.Parallel()
	s := newHookStub(t, "")
	s.process(t, "/x/master", "-C", s.etc+"/imapd.conf", "-M", s.etc+"/cyrus-master.conf")
	if out, err := s.give(t, "0\n", "promote", "promote", 1); err == nil || !strings.Contains(out, "takes no connections") {
		t.Errorf("promote: %v: %s", err, out)
	}
	s.process(t, "imapd", "-C", s.etc+"/imapd.conf")
	if out, err := s.give(t, "0\n", "promote", "promote", 2); err != nil || !strings.Contains(out, "is a master already") {
		t.Errorf("promote: %v: %s", err, out)
	}
}

// TestHookPendingStop: a hook was killed while something was stopping the instance
// for it: that may go on, so that what is there still will not stay.
func TestHookPendingStop(t *testing.T) {
	t.Parallel()
	s := newHookStub(t, "start=touch $DIR/started\n")
	old := s.process(t, "/x/master", "-C", s.etc+"/imapd.conf", "-M", s.etc+"/cyrus-master.conf")
	s.process(t, "imapd", "-C", s.etc+"/imapd.conf")
	writeFile(t, filepath.Join(s.dir, "state/a.stopping"), "")
	if out, _ := s.at(t, "undo_demote", "undo_demote", 1); strings.Contains(out, "already") {
		t.Errorf("undo_demote trusts it: %s", out)
	}
	if err := old.Wait(); err == nil {
		t.Error("it was not ended")
	}
	if _, err := os.Stat(filepath.Join(s.dir, "started")); err != nil {
		t.Errorf("nothing was started: %v", err)
	}
}

// TestHookStarts: an instance that starts by itself is what the table says, but
// one that has something to lose is nothing.
func TestHookStarts(t *testing.T) {
	t.Parallel()
	const open = `{"role":"ma01","active":"b","phase":"open","in_doubt":false}`
	const stale = `{"role":"ma02","active":"b","phase":"open","in_doubt":false,"stale":{"a":{"number":3}}}`
	for name, test := range map[string]struct{ table, log, want string }{
		"replica":            {"[" + open + "]", "", "cyrus-replica.conf"},
		"unsent":             {"[" + open + "]", "log", "does not start"},
		"unsent, no answer":  {"", "flush.1", "does not start"},
		"nothing, no answer": {"", "", "cyrus-replica.conf"},
		"an empty answer":    {" \n", "", "cyrus-replica.conf"},
		"stale":              {"[" + open + "," + stale + "]", "", "does not start"},
		"another is stale":   {"[" + open + "," + strings.Replace(stale, `"a"`, `"c"`, 1) + "]", "", "cyrus-replica.conf"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newHookStub(t, "ask=cat $DIR/table\n")
			if test.table != "" {
				writeFile(t, filepath.Join(s.dir, "table"), test.table)
			}
			if test.log != "" {
				writeFile(t, filepath.Join(s.dir, "conf/sync", test.log), "USER u0001\n")
			}
			if out := s.run(t); !strings.Contains(out, test.want) {
				t.Errorf("it says %q", out)
			}
		})
	}
}

// TestHookAsksAgain: after a power cut nobody may answer at first.
func TestHookAsksAgain(t *testing.T) {
	t.Parallel()
	s := newHookStub(t, "ask=$DIR/bin/ask\nask_for=30\n")
	s.program(t, "ask", `[ -e $0.asked ] || { touch $0.asked; exit 1; }
[ -e $0.starts ] || { touch $0.starts; echo '[{"role":"ma01","active":"a","phase":"open","in_doubt":false,"blocked":"starts"}]'; exit; }
echo '[{"role":"ma01","active":"a","phase":"open","in_doubt":false,"blocked":""}]'`)
	if out := s.run(t); !strings.Contains(out, "cyrus-master.conf") {
		t.Errorf("it says %q", out)
	}
}

// TestHookLayout: what the hooks would not recognise is refused.
func TestHookLayout(t *testing.T) {
	t.Parallel()
	s := newHookStub(t, "a.dir=$DIR/conf/../etc/\n")
	if out, err := s.at(t, "fence", "fence", 1); err != nil {
		t.Errorf("with another spelling of the directory: %v: %s", err, out)
	}
	member := s.process(t, "imapd", "-C", s.etc+"/imapd.conf")
	if out, err := s.at(t, "fence", "fence", 2); err != nil {
		t.Errorf("fence: %v: %s", err, out)
	}
	if err := member.Wait(); err == nil {
		t.Error("a process of the instance was not ended")
	}
	writeFile(t, filepath.Join(s.etc, "cyrus-master.conf"), "SERVICES {\n  imap cmd=\"imapd -C "+s.etc+"/imapd.conf -s\" listen=\"143\"\n  # pop3 cmd=\"pop3d\"\n"+
		"  lmtp cmd=\"lmtpd -a\" listen=\"24\"\n}\n")
	if out, err := s.at(t, "fence", "fence", 3); err == nil || !strings.Contains(out, "lmtpd") || strings.Contains(out, "imapd -C") || strings.Contains(out, "pop3d") {
		t.Errorf("with a service that is told no configuration: %v: %s", err, out)
	}
	writeFile(t, filepath.Join(s.etc, "imapd.conf"), "@include: other\n")
	if out, err := s.at(t, "fence", "fence", 4); err == nil || !strings.Contains(out, "no configdirectory") {
		t.Errorf("without a configdirectory: %v: %s", err, out)
	}
}

// TestHookCatchUpBound: sync_client looks at every mailbox of whom it is given; of
// more than the site says, the log has to do.
func TestHookCatchUpBound(t *testing.T) {
	t.Parallel()
	s := newHookStub(t, "catch_up_users=2\n")
	s.program(t, "sync_client", "echo \"$*\" >>"+s.dir+"/calls")
	writeFile(t, filepath.Join(s.dir, "conf/sync/log"), "USER u0001\n")
	out, err := s.give(t, "u0001\nu0002\nu0003\n", "catch_up", "catch_up", 1)
	if err != nil || !strings.Contains(out, "3 users are more than catch_up_users") {
		t.Errorf("catch_up: %v: %s", err, out)
	}
	if calls := readFile(t, filepath.Join(s.dir, "calls")); !strings.Contains(calls, " -r ") || strings.Contains(calls, " -u ") {
		t.Errorf("sync_client was called with %q", calls)
	}
	if out, err := s.give(t, "u0001\nu0002\n", "catch_up", "catch_up", 2); err != nil || !strings.Contains(out, "2 names given to sync_client -u") {
		t.Errorf("catch_up: %v: %s", err, out)
	}
}

// TestHookPromotesWhatNeverSent: a replica that was never a master has no sync
// directory; it must not be stopped for that.
func TestHookPromotesWhatNeverSent(t *testing.T) {
	t.Parallel()
	s := newHookStub(t, "start=touch $DIR/started\n")
	must(t, os.Remove(filepath.Join(s.dir, "conf/sync")))
	must(t, os.Chown(filepath.Join(s.dir, "conf"), 1, 1))
	s.give(t, "0\n", "promote", "promote", 1)
	if _, err := os.Stat(filepath.Join(s.dir, "started")); err != nil {
		t.Errorf("nothing was started: %v", err)
	}
	if info, err := os.Stat(filepath.Join(s.dir, "conf/sync")); err != nil || info.Sys().(*syscall.Stat_t).Uid != 1 {
		t.Errorf("the sync log has no directory of Cyrus's: %v %+v", err, info)
	}
}

// TestHookGate: what the other backend's check says decides whether a master is
// started or ended, and marked. A hook that has ended says nothing.
func TestHookGate(t *testing.T) {
	t.Parallel()
	for input, want := range map[string]string{"": "75", "75\n": "75", "1\n": "1"} {
		for _, step := range []string{"demote", "promote"} {
			s := newHookStub(t, "start=touch $DIR/started\n")
			part := map[string]string{"demote": "master", "promote": "replica"}[step]
			running := s.process(t, "/x/master", "-C", s.etc+"/imapd.conf", "-M", s.etc+"/cyrus-"+part+".conf")
			out, err := s.give(t, input, step, step, 1)
			if err == nil || !strings.Contains(err.Error(), "status "+want) {
				t.Errorf("%s, told %q: %v: %s", step, input, err, out)
			}
			if s.has("started") || s.has("state/a.mark") {
				t.Errorf("%s, told %q, has started something, or said so", step, input)
			}
			if _, err := os.Stat(fmt.Sprintf("/proc/%d/exe", running.Process.Pid)); err != nil && step == "demote" {
				t.Errorf("%s, told %q, has ended the master", step, input)
			}
		}
	}
	s := newDovecotStub(t)
	if out, err := s.give(t, "75\n", "promote", "promote", 1); !tryAgain(err) || s.has("state/a.mark") {
		t.Errorf("Dovecot's promote: %v: %s", err, out)
	}
}

// TestHookGateIsBounded: whoever was to say how the check ended may have gone
// without a word, and the stage has the instance's lock.
func TestHookGateIsBounded(t *testing.T) {
	t.Parallel()
	s := newHookStub(t, "")
	silent, kept, err := os.Pipe()
	must(t, err)
	defer silent.Close()
	defer kept.Close()
	if out, err := s.in(t, "LANG=C", silent, "promote", "promote", 1); !tryAgain(err) || !strings.Contains(out, "was not told to go on") {
		t.Errorf("promote: %v: %s", err, out)
	}
}

// TestHookTickets: a ticket is for the start that was asked for with it. One that is
// left would make a master of what its host starts later.
func TestHookTickets(t *testing.T) {
	t.Parallel()
	s := newHookStub(t, "start=false\n")
	if out, err := s.give(t, "0\n", "demote", "demote", 1); !tryAgain(err) || s.has("state/a.ticket") {
		t.Errorf("demote, whose start command fails: %v: %s", err, out)
	}
	s.process(t, "/x/master", "-C", s.etc+"/imapd-replica.conf", "-M", s.etc+"/cyrus-replica.conf")
	s.process(t, "sync_server", "-C", s.etc+"/imapd-replica.conf")
	boot := strings.TrimSpace(readFile(t, "/proc/sys/kernel/random/boot_id"))
	writeFile(t, filepath.Join(s.dir, "state/a.ticket"), boot+" 99999999999 master\n")
	if out, err := s.at(t, "undo_promote", "undo_promote", 2); err != nil || s.has("state/a.ticket") {
		t.Errorf("undo_promote of what is a replica: %v: %s", err, out)
	}
}

// TestHookOutputEnds: what a hook has started, here a replica, does not keep its output
// open.
func TestHookOutputEnds(t *testing.T) {
	t.Parallel()
	s := newHookStub(t, "start=$DIR/bin/start\n")
	s.program(t, "start", "setsid sleep 20 </dev/null >/dev/null 2>&1 &")
	b := filepath.Join(s.dir, "b")
	must(t, os.CopyFS(b, os.DirFS(s.etc)))
	writeFile(t, s.conf, strings.ReplaceAll(readFile(t, s.conf), "b.host=nowhere", "b.dir="+b))
	read, write, err := os.Pipe()
	must(t, err)
	defer read.Close()
	cmd := exec.Command(s.script, "-c", s.conf, "demote")
	cmd.Env = append(os.Environ(), "POSTHOUSE_ROLE=ma01", "POSTHOUSE_FROM=a", "POSTHOUSE_TO=b", "POSTHOUSE_SWITCH=1", "POSTHOUSE_EPOCH=1",
		"POSTHOUSE_ATTEMPT=1", "POSTHOUSE_STEP=demote")
	cmd.Stdout, cmd.Stderr = write, write
	must(t, cmd.Start())
	write.Close()
	must(t, read.SetReadDeadline(time.Now().Add(15*time.Second)))
	out, err := io.ReadAll(read)
	cmd.Wait()
	if err != nil || !strings.Contains(string(out), "does not start as replica") {
		t.Errorf("%v: %s", err, out)
	}
}

// TestHookBelievesNoName: anybody may give his program a name of several lines, or
// none, or that of another process.
func TestHookBelievesNoName(t *testing.T) {
	t.Parallel()
	s := newHookStub(t, "")
	victim := s.process(t, "innocent")
	for _, name := range []string{fmt.Sprintf("/x\n%d imapd -C %s/imapd.conf\nx", victim.Process.Pid, s.etc), "/", "", fmt.Sprint(victim.Process.Pid), fmt.Sprint(" ", victim.Process.Pid)} {
		s.process(t, name, "-C", s.etc+"/imapd.conf")
	}
	if out, err := s.at(t, "fence", "fence", 1); err != nil {
		t.Errorf("fence: %v: %s", err, out)
	}
	if _, err := os.Stat(fmt.Sprintf("/proc/%d/exe", victim.Process.Pid)); err != nil {
		t.Error("a process was ended that has nothing to do with the instance")
	}
}

// TestHookIsBlind: who cannot see the processes does not say that there are none.
func TestHookIsBlind(t *testing.T) {
	t.Parallel()
	s := newDovecotStub(t)
	s.program(t, "ps", "exit 1")
	left := exec.Command("sh", "-c", "sleep 20 & echo $$")
	left.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	read, write, err := os.Pipe()
	must(t, err)
	left.Stdout = write
	must(t, left.Run()) // its child goes on, in the session of a leader that has gone
	write.Close()
	defer read.Close()
	var leader int
	_, err = fmt.Fscan(read, &leader)
	must(t, err)
	t.Cleanup(func() { syscall.Kill(-leader, syscall.SIGKILL) })
	boot := strings.TrimSpace(readFile(t, "/proc/sys/kernel/random/boot_id"))
	writeFile(t, filepath.Join(s.dir, "state/a.session"), fmt.Sprintln(boot, leader))
	for i, step := range []string{"prove", "fence"} {
		out, err := s.in(t, "PATH="+s.dir+"/bin:"+os.Getenv("PATH"), nil, step, step, i+1)
		if err == nil {
			t.Errorf("%s: %s", step, out)
		}
	}
	if out, err := s.at(t, "prove", "prove", 3); !tryAgain(err) || !strings.Contains(out, "processes are left") {
		t.Errorf("prove: %v: %s", err, out)
	}
}

// TestHookTakesAllOrNone: a list of users or messages that is cut short would
// leave the rest behind.
func TestHookTakesAllOrNone(t *testing.T) {
	t.Parallel()
	s := newDovecotStub(t)
	s.process(t, "dovecot", "-c", s.etc+"/dovecot-replica.conf")
	for i, op := range []string{"catch_up", "list"} {
		out, err := s.in(t, "TMPDIR=/nonexistent", strings.NewReader("u0001\n"), op, "catch_up", i+1)
		if !tryAgain(err) {
			t.Errorf("%s without room for the users: %v: %s", op, err, out)
		}
	}
	if calls := readFile(t, filepath.Join(s.dir, "calls")); strings.Contains(calls, "sync") {
		t.Errorf("doveadm was called with %q", calls)
	}
	out, err := s.give(t, "u0001\tguid\t1\t\n", "agree", "catch_up", 3)
	if !tryAgain(err) || !strings.Contains(out, "not whole") {
		t.Errorf("agree to half a list: %v: %s", err, out)
	}
}

// TestHookSeesWhoBecomesAnother: a process that calls execve has no arguments for a
// moment. Who is overlooked then would count as ended.
func TestHookSeesWhoBecomesAnother(t *testing.T) {
	t.Parallel()
	s := newHookStub(t, "")
	s.program(t, "imapd", `exec "$0" "$@"`)
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	must(t, err)
	client, served := os.NewFile(uintptr(fds[0]), "client"), os.NewFile(uintptr(fds[1]), "served")
	defer client.Close()
	cmd := exec.Command(filepath.Join(s.dir, "bin/imapd"), "-C", s.etc+"/imapd.conf")
	cmd.Stdin = served
	must(t, cmd.Start())
	served.Close()
	defer cmd.Wait()
	defer cmd.Process.Kill()
	for i := range 20 {
		if out, err := s.at(t, "prove", "prove", i+1); err == nil {
			t.Fatalf("look %d has not seen it: %s", i+1, out)
		}
	}
}
