package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
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
	expand := strings.NewReplacer("$DIR", dir)
	writeFile(t, s.conf, expand.Replace("a.dir=$DIR/etc\na.peer=b\na.roles=ma01\nb.host=nowhere\nb.peer=a\nstate=$DIR/state\nprogram=$DIR/bin\nlimit=2\n"+lines))
	must(t, os.WriteFile(filepath.Join(dir, "bin/master"), []byte("#!/bin/sh\necho has become master $*\n"), 0o755))
	return s
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
	return runTool(t, 20*time.Second, nil, s.script, "-c", s.conf, "--at", op, "a", fmt.Sprint(number), fmt.Sprint(100+number), "1", step, "ma01", "b")
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
	if out, err := s.at(t, "promote", "promote", 1); err == nil || !strings.Contains(out, "takes no connections") {
		t.Errorf("promote: %v: %s", err, out)
	}
	s.process(t, "imapd", "-C", s.etc+"/imapd.conf")
	if out, err := s.at(t, "promote", "promote", 2); err != nil || !strings.Contains(out, "is a master already") {
		t.Errorf("promote: %v: %s", err, out)
	}
}
