//go:build bench

package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// cgroup is a control group of version 2 (cgroups(7)). It counts the CPU time of
// all processes that were ever in it, those that have ended included.
type cgroup struct{ dir string }

// newCgroup puts a daemon into a group of its own. What the daemon starts later
// is born there.
func newCgroup(t *testing.T, d *daemon) *cgroup {
	t.Helper()
	root := "/sys/fs/cgroup"
	if _, err := os.Stat(filepath.Join(root, "cgroup.procs")); err != nil {
		root = filepath.Join(root, "unified") // beside version 1
	}
	g := &cgroup{filepath.Join(root, "posthouse-bench-"+strconv.Itoa(d.pid()))}
	if err := os.Mkdir(g.dir, 0o755); err != nil {
		t.Fatalf("%v; control groups must be writable", err)
	}
	// Cleanups run last first: the daemon ends after this one was called.
	home := filepath.Join(root, "cgroup.procs")
	t.Cleanup(func() {
		for _, pid := range g.pids() {
			os.WriteFile(home, []byte(pid), 0)
		}
		if !becomes(5*time.Second, func() bool { return os.Remove(g.dir) == nil }) {
			t.Errorf("%s is still there", g.dir)
		}
	})
	within(t, 5*time.Second, "all processes are in their group", func() bool {
		in := map[string]bool{}
		for _, pid := range g.pids() {
			in[pid] = true
		}
		all := true
		for _, p := range d.family() {
			if pid := strconv.Itoa(p.pid); !in[pid] {
				all = false
				os.WriteFile(filepath.Join(g.dir, "cgroup.procs"), []byte(pid), 0) // it may have ended
			}
		}
		return all
	})
	return g
}

func (g *cgroup) pids() []string {
	raw, _ := os.ReadFile(filepath.Join(g.dir, "cgroup.procs"))
	return strings.Fields(string(raw))
}

// cpu is the time used so far. A nil group uses none.
func (g *cgroup) cpu(t *testing.T) time.Duration {
	t.Helper()
	if g == nil {
		return 0
	}
	var used int64
	if _, err := fmt.Sscanf(readFile(t, filepath.Join(g.dir, "cpu.stat")), "usage_usec %d", &used); err != nil {
		t.Fatalf("%s: %v", g.dir, err)
	}
	return time.Duration(used) * time.Microsecond
}

// pss is the memory of all processes, in octets; what several share is counted
// once.
func (g *cgroup) pss() int64 {
	var sum int64
	for _, pid := range g.pids() {
		raw, _ := os.ReadFile(filepath.Join("/proc", pid, "smaps_rollup"))
		for line := range strings.Lines(string(raw)) {
			if kb, found := strings.CutPrefix(line, "Pss:"); found {
				n, _ := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(kb), " kB"), 10, 64)
				sum += n << 10
			}
		}
	}
	return sum
}
