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

const sshdProgram = "/opt/posthouse-test/sshd/usr/sbin/sshd"

// sshd is a real OpenSSH server with the forced command that the hooks need.
type sshd struct {
	*daemon
	address, hostKey string
}

// startSSHD starts one for root, who may have no password there. It sees an
// /etc/passwd of its own: sshd wants a user of its name.
func startSSHD(t testing.TB, host, clientKey, forced string) *sshd {
	t.Helper()
	dir := newDir(t, "sshd-")
	key := filepath.Join(dir, "host_key")
	makeKey(t, key)
	writeFile(t, filepath.Join(dir, "authorized_keys"), fmt.Sprintf("restrict,from=%q,command=%q %s", "127.0.0.0/8", forced, readFile(t, clientKey+".pub")))
	writeFile(t, filepath.Join(dir, "sshd_config"), fmt.Sprintf("ListenAddress %s\nPort 22\nHostKey %s\nAuthorizedKeysFile %s/authorized_keys\n"+
		"PidFile none\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin forced-commands-only\nLogLevel VERBOSE\n", host, key, dir))
	writeFile(t, filepath.Join(dir, "passwd"), readFile(t, "/etc/passwd")+"\nsshd:x:65533:65534::/run/sshd:/usr/sbin/nologin\n")
	writeFile(t, filepath.Join(dir, "shadow"), "root:*:1::::::\nsshd:*:1::::::\n")
	writeFile(t, filepath.Join(dir, "start"), `
for file in passwd shadow; do mount --bind "$1/$file" /etc/$file || exit; done
mkdir -p /run/sshd && exec "$2" -D -e -f "$1/sshd_config"
`)
	d := startDaemon(t, "sshd", dir, "unshare", "--mount", "sh", filepath.Join(dir, "start"), dir, sshdProgram)
	s := &sshd{d, host + ":22", readFile(t, key+".pub")}
	t.Cleanup(func() { d.stop(t, 10*time.Second) })
	within(t, 10*time.Second, "sshd listens", func() bool { return accepts(s.address) })
	return s
}

func makeKey(t testing.TB, path string) {
	t.Helper()
	if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path).CombinedOutput(); err != nil {
		t.Fatalf("ssh-keygen: %v: %s", err, out)
	}
}

// overSSH gives the site a real ssh to b's host, as the README does; more are further
// words of it.
func (s *hookSite) overSSH(t testing.TB, more string) *sshd {
	t.Helper()
	key := filepath.Join(s.dir, "hooks_ed25519")
	if _, err := os.Stat(key); err != nil {
		makeKey(t, key)
	}
	host := nextHost()
	server := startSSHD(t, host, key, fmt.Sprintf("%s -c %s/remote.conf --remote", s.script, s.dir))
	known := filepath.Join(s.dir, "known_hosts")
	writeFile(t, known, host+" "+server.hostKey)
	ssh := fmt.Sprintf("ssh -o BatchMode=yes -o ConnectTimeout=3 -o ServerAliveInterval=2 -o ServerAliveCountMax=2 -o UserKnownHostsFile=%s -i %s %s", known, key, more)
	var lines []string
	for line := range strings.Lines(readFile(t, s.config)) {
		switch {
		case strings.HasPrefix(line, "ssh="):
			line = "ssh=" + strings.TrimSpace(ssh) + "\n"
		case strings.HasPrefix(line, "b.host="):
			line = "b.host=root@" + host + "\n"
		}
		lines = append(lines, line)
	}
	writeFile(t, s.config, strings.Join(lines, ""))
	return server
}

// TestHooksOverSSH: the shipped hooks reach the other host by a real ssh and its
// forced command: anew for each stage, and by a connection that is kept.
func TestHooksOverSSH(t *testing.T) {
	t.Parallel()
	users := userNames(3)
	s, a, b := newHookedPair(t, users...)
	rounds := func(t *testing.T) {
		took := map[string][]time.Duration{}
		for range 2 {
			for _, way := range []struct {
				from, to  string
				old, next hookedCyrus
			}{{"a", "b", a, b}, {"b", "a", b, a}} {
				deliverMany(t, way.old.lmtp(), 5, users...)
				want := subjectsOf(t, way.old, users[2])
				for step, d := range s.change(t, way.from, way.to, users, nil) {
					took[step] = append(took[step], d)
				}
				way.next.mustBe(t, "master")
				way.old.mustBe(t, "replica")
				if has := subjectsOf(t, way.next, users[2]); fmt.Sprint(has) != fmt.Sprint(want) {
					t.Errorf("%s has %q, want %q", way.to, has, want)
				}
			}
		}
		logTook(t, took)
	}
	s.overSSH(t, "")
	t.Run("anew", rounds)
	server := s.overSSH(t, "-o ControlMaster=auto -o ControlPersist=60 -o ControlPath="+filepath.Join(s.dir, "%h"))
	words := append(strings.Fields(setting(t, s.config, "ssh")), "root@"+strings.TrimSuffix(server.address, ":22"))
	hangUp := func() { exec.Command(words[0], append([]string{"-O", "exit"}, words[1:]...)...).Run() }
	t.Cleanup(hangUp)
	t.Run("kept", rounds)

	// Nobody gets anything else out of it.
	for _, request := range []string{"id", "promote b 1 1 1 promote ma01 a; id", ""} {
		out, err := runTool(t, 10*time.Second, nil, append(words, strings.Fields(request)...)...)
		if err == nil || !strings.Contains(out, "refused") || strings.Contains(out, "uid=") {
			t.Errorf("%q: %v: %s", request, err, out)
		}
	}

	// A host that is not reached keeps the old one at work.
	hangUp()
	server.stop(t, 10*time.Second)
	s.number++
	s.must(t, 1, call{step: "demote", from: "a", to: "b", number: s.number, attempt: 1, users: users}, "a serves on")
	a.mustBe(t, "master")
}

// setting is a value of a hooks' configuration.
func setting(t testing.TB, path, key string) string {
	t.Helper()
	for line := range strings.Lines(readFile(t, path)) {
		if value, ok := strings.CutPrefix(line, key+"="); ok {
			return strings.TrimSpace(value)
		}
	}
	t.Fatalf("%s has no %s", path, key)
	return ""
}
