package statedir

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"testing"
)

func remember(t testing.TB, d *Dir, user, role, want string) {
	t.Helper()
	if got, err := d.Remember(user, role); err != nil || got != want {
		t.Errorf("Remember(%q, %s) = %q, %v; want %s", user, role, got, err, want)
	}
}

func recall(t testing.TB, d *Dir, user, want string) {
	t.Helper()
	if got, err := d.Recall(user); err != nil || got != want {
		t.Errorf("Recall(%q) = %q, %v; want %q", user, got, err, want)
	}
}

func readFile(t testing.TB, path string) string {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

// The role last used outlives the process and is the same for all siblings.
func TestSafety26Remember(t *testing.T) {
	path := t.TempDir()
	a, b := openDir(t, path), openDir(t, path)
	recall(t, a, "alice", "")
	remember(t, a, "alice", "ma01", "ma01")
	remember(t, a, "alice", "ma02", "ma01")
	remember(t, b, "alice", "ma02", "ma01")
	recall(t, b, "alice", "ma01")
	recall(t, b, "bob", "")
	if got := readFile(t, a.join(rolesName)); got != "alice\tma01\n" {
		t.Errorf("the file holds %q", got)
	}
	if err := b.Replace("alice", "ma02"); err != nil {
		t.Fatal(err)
	}
	recall(t, a, "alice", "ma02") // at once, though a had the old one in memory
	if err := a.Replace("carol", "ma03"); err != nil {
		t.Fatal(err)
	}
	remember(t, openDir(t, path), "carol", "ma01", "ma03")
	recall(t, openDir(t, path), "alice", "ma02")
}

func TestRememberRefuses(t *testing.T) {
	d := openDir(t, t.TempDir())
	for _, c := range [][2]string{
		{"", "ma01"}, {"alice", ""}, {"a\tb", "ma01"}, {"a\nb", "ma01"}, {"a\x00", "ma01"}, {"alice", "ma\t01"}, {"alice", "ma\r"},
		{strings.Repeat("a", lineMax), "ma01"},
	} {
		if _, err := d.Remember(c[0], c[1]); err == nil {
			t.Errorf("Remember(%.10q, %q) was taken", c[0], c[1])
		}
	}
	if got := readFile(t, d.join(rolesName)); got != "" {
		t.Errorf("and wrote %.50q", got)
	}
	longest := strings.Repeat("a", lineMax-6)
	remember(t, d, longest, "ma01", "ma01")
	recall(t, openDir(t, d.Path()), longest, "ma01")
}

// Half a line after a crash is no line, and never becomes one: "alice TAB ma0"
// of "alice TAB ma01" would be another role.
func TestSafety26TornLine(t *testing.T) {
	path := t.TempDir()
	a := openDir(t, path)
	remember(t, a, "bob", "ma02", "ma02")
	file := filepath.Join(path, rolesName)
	appendTo(t, file, "alice\tma0")
	recall(t, a, "alice", "")
	remember(t, a, "carol", "ma03", "ma03")
	remember(t, a, "alice", "ma01", "ma01")
	if got := readFile(t, file); got != "bob\tma02\ncarol\tma03\nalice\tma01\n" {
		t.Errorf("the file holds %q", got)
	}
	appendTo(t, file, "dave\tma0")
	b := openDir(t, path)
	recall(t, b, "dave", "")
	if got := readFile(t, file); strings.Contains(got, "dave") {
		t.Errorf("Open left half a line: %q", got)
	}
	// A power loss can leave zeros where lines were not on the disk yet.
	appendTo(t, file, "erin\tma\x00\x00"+strings.Repeat("\x00", 200_000)+"x\tma03\nfrank\tma04\n")
	for _, d := range []*Dir{a, b, openDir(t, path)} {
		recall(t, d, "frank", "ma04")
		recall(t, d, "erin", "")
		recall(t, d, "x", "")
	}
}

func appendTo(t *testing.T, path, text string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(text); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// A line that no crash explains is "could not tell", with its place.
func TestRolesBadLine(t *testing.T) {
	for name, bad := range map[string]string{
		"no tab": "alice ma01", "empty": "", "no role": "alice\t", "two tabs": "alice\tma01\tx",
		"long": strings.Repeat("a", lineMax) + "\tma01", "longer than the buffer": strings.Repeat("a", 200_000) + "\tma01",
	} {
		t.Run(name, func(t *testing.T) {
			path := t.TempDir()
			d := openDir(t, path)
			remember(t, d, "bob", "ma02", "ma02")
			file := filepath.Join(path, rolesName)
			appendTo(t, file, bad+"\nzoe\tma09\n")
			want := file + ":2: "
			for range 2 {
				if _, err := d.Remember("new", "ma01"); err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("Remember: %v, want %s", err, want)
				}
			}
			if _, err := Open(path); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("Open: %v, want %s", err, want)
			}
			writeFile(t, file, "bob\tma02\n") // as the message says
			remember(t, d, "new", "ma01", "ma01")
		})
	}
}

// Whatever an operator does to the file, what it says then counts.
func TestRolesReplacedByHand(t *testing.T) {
	path := t.TempDir()
	d := openDir(t, path)
	file := filepath.Join(path, rolesName)
	remember(t, d, "alice", "ma01", "ma01")
	writeFile(t, file+".new", "alice\tma02\nbob\tma03\n")
	if err := os.Rename(file+".new", file); err != nil {
		t.Fatal(err)
	}
	recall(t, d, "alice", "ma02")
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	remember(t, d, "alice", "ma04", "ma04")
	if err := os.Truncate(file, 0); err != nil {
		t.Fatal(err)
	}
	recall(t, d, "alice", "")
	remember(t, d, "bob", "ma05", "ma05")
	if got := readFile(t, file); got != "bob\tma05\n" {
		t.Errorf("the file holds %q", got)
	}
}

// Many superseded lines are rewritten at Open, under siblings that have the
// old file open and go on.
func TestRolesCompaction(t *testing.T) {
	path := t.TempDir()
	file := filepath.Join(path, rolesName)
	old := openDir(t, path)
	var text strings.Builder
	for i := range 3 * compactFrom {
		fmt.Fprintf(&text, "user%d\tma%02d\n", i%compactFrom, i/compactFrom)
	}
	text.WriteString("torn\x00\nhalf\tma0")
	appendTo(t, file, text.String())
	recall(t, old, "user7", "ma02")
	fresh := openDir(t, path)
	if n := strings.Count(readFile(t, file), "\n"); n != compactFrom {
		t.Errorf("%d lines are left of %d users", n, compactFrom)
	}
	remember(t, old, "late", "ma07", "ma07")
	remember(t, fresh, "late", "ma08", "ma07")
	remember(t, fresh, "later", "ma08", "ma08")
	for _, d := range []*Dir{old, fresh, openDir(t, path)} {
		recall(t, d, "user7", "ma02")
		recall(t, d, "user9999", "ma02")
		recall(t, d, "later", "ma08")
		recall(t, d, "half", "")
	}
	for _, left := range []string{".tmp", ".old"} {
		if _, err := os.Stat(file + left); err == nil {
			t.Errorf("%s was left behind", left)
		}
	}
}

// Four processes, each with another opinion, some killed: all were told the
// same role of each user, and that is what is on the disk.
// Mutation: no second look under the lock, and two roles are told of one user.
func TestSafety26Processes(t *testing.T) {
	path := t.TempDir()
	d := openDir(t, path)
	const processes, users = 4, 150
	var mu sync.Mutex
	told := map[string]map[string]bool{}
	var wg sync.WaitGroup
	for i := range processes {
		wg.Go(func() {
			c := start(t, nil, "remember", path, fmt.Sprint("ma", i))
			defer func() { c.kill() }()
			for j := range users {
				user := fmt.Sprint("user", j)
				role := c.ask(user)
				mu.Lock()
				if told[user] == nil {
					told[user] = map[string]bool{}
				}
				told[user][role] = true
				mu.Unlock()
				if j == users/2 && i < 2 { // asked, and killed before or while it answers
					_, _ = fmt.Fprintln(c.in, "extra")
					c.kill()
					c = start(t, nil, "remember", path, fmt.Sprint("ma", i))
				}
			}
		})
	}
	wg.Wait()
	for user, roles := range told {
		if len(roles) != 1 {
			t.Errorf("%s was said to be in %v", user, roles)
			continue
		}
		for role := range roles {
			recall(t, d, user, role)
		}
	}
	if len(told) != users {
		t.Errorf("%d of %d users were told", len(told), users)
	}
}

// The line is on the disk before anybody is told; a line that a sibling wrote
// is, too. And if the disk says no, so does Remember.
func TestSafety26Fsynced(t *testing.T) {
	path := t.TempDir()
	openDir(t, path)
	log := filepath.Join(t.TempDir(), "strace")
	c := start(t, []string{"-o", log, "-e", "trace=write,pwrite64,fsync"}, "remember", path, "ma01")
	if got := c.ask("alice"); got != "ma01" {
		t.Fatalf("Remember said %q", got)
	}
	c.end()
	file := regexp.QuoteMeta(filepath.Join(path, rolesName))
	order := regexp.MustCompile(`(?s)pwrite64\(\d+<` + file + `>.*fsync\(\d+<` + file + `>.*write\(1<`)
	if calls := readFile(t, log); !order.MatchString(calls) {
		t.Errorf("not written, fsynced and told in this order:\n%s", calls)
	}
	c = start(t, []string{"-o", "/dev/null", "-e", "trace=fsync", "-e", "inject=fsync:error=EIO:when=1"}, "remember", path, "ma01")
	if got := c.ask("bob"); !strings.Contains(got, "input/output error") {
		t.Errorf("Remember said %q", got)
	}
	c.end()
}

func TestRememberConcurrently(t *testing.T) {
	path := t.TempDir()
	dirs := []*Dir{openDir(t, path), openDir(t, path)}
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			for j := range 30 {
				user := fmt.Sprint("u", j)
				if _, err := dirs[i%2].Remember(user, fmt.Sprint("ma", i)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	for j := range 30 {
		user := fmt.Sprint("u", j)
		want, err := dirs[0].Recall(user)
		if err != nil || want == "" {
			t.Fatalf("Recall(%s) = %q, %v", user, want, err)
		}
		recall(t, dirs[1], user, want)
	}
	if n := strings.Count(readFile(t, filepath.Join(path, rolesName)), "\n"); n != 30 {
		t.Errorf("%d lines for 30 users", n)
	}
}

func FuzzRoles(f *testing.F) {
	f.Add([]byte("alice\tma01\nbob\tma0"))
	f.Add([]byte("\x00\x00\n\tx\n"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		r := &roles{d: &Dir{}, last: map[userKey]uint32{}, number: map[string]uint32{}}
		err := r.read(bytes.NewReader(raw), 0)
		if r.size > int64(len(raw)) || r.size > 0 && raw[r.size-1] != '\n' {
			t.Fatalf("read %d of %d bytes", r.size, len(raw))
		}
		if err == nil && bytes.IndexByte(raw[r.size:], '\n') >= 0 {
			t.Fatalf("stopped at %d before a whole line", r.size)
		}
	})
}

func BenchmarkRememberHit(b *testing.B) {
	d := openDir(b, b.TempDir())
	remember(b, d, "alice@example.org", "ma01", "ma01")
	b.ReportAllocs()
	for b.Loop() {
		remember(b, d, "alice@example.org", "ma01", "ma01")
	}
}

// One at a time: each waits for its own fsync.
func BenchmarkRememberMiss(b *testing.B) {
	d := openDir(b, b.TempDir())
	i := 0
	for b.Loop() {
		i++
		remember(b, d, fmt.Sprint("user", i), "ma01", "ma01")
	}
}

// 256 logins at once share fsyncs.
func BenchmarkRememberMissParallel(b *testing.B) {
	d := openDir(b, b.TempDir())
	var mu sync.Mutex
	n := 0
	b.SetParallelism(256 / runtime.GOMAXPROCS(0))
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			mu.Lock()
			n++
			user := fmt.Sprint("user", n)
			mu.Unlock()
			remember(b, d, user, "ma01", "ma01")
		}
	})
}

// Open with 10 million users: time, and memory that stays.
func BenchmarkOpen10M(b *testing.B) {
	path := b.TempDir()
	openDir(b, path)
	f, err := os.Create(filepath.Join(path, rolesName))
	if err != nil {
		b.Fatal(err)
	}
	w := bufio.NewWriter(f)
	const users = 10_000_000
	for i := range users {
		fmt.Fprintf(w, "user%d@example.org\tma%02d\n", i, i%100)
	}
	if err := w.Flush(); err != nil {
		b.Fatal(err)
	}
	if err := f.Close(); err != nil {
		b.Fatal(err)
	}
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	var d *Dir
	for b.Loop() {
		d, err = Open(path)
		if err != nil {
			b.Fatal(err)
		}
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/1e6, "MB")
	recall(b, d, "user1234567@example.org", "ma67")
	if err := d.Close(); err != nil {
		b.Fatal(err)
	}
}
