package statedir

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

func wantSnapshot(t *testing.T, d *Dir, want string) {
	t.Helper()
	got, err := d.LoadSnapshot()
	if err != nil || string(got) != want {
		t.Errorf("LoadSnapshot = %q, %v; want %q", got, err, want)
	}
}

func TestSnapshot(t *testing.T) {
	path := t.TempDir()
	a, b := openDir(t, path), openDir(t, path)
	if got, err := a.LoadSnapshot(); got != nil || err != nil {
		t.Errorf("LoadSnapshot = %q, %v; want none", got, err)
	}
	save := func(d *Dir, revision uint64, data string) {
		t.Helper()
		if err := d.SaveSnapshot(revision, []byte(data)); err != nil {
			t.Error(err)
		}
	}
	save(a, 0, "")
	wantSnapshot(t, b, "")
	save(a, 5, "five\n\x00")
	save(b, 4, "four")
	wantSnapshot(t, b, "five\n\x00")
	save(b, 5, "five again")
	wantSnapshot(t, a, "five again")
	if err := a.ReplaceSnapshot(3, []byte("three")); err != nil {
		t.Error(err)
	}
	wantSnapshot(t, b, "three")
}

// A frontend that acked a HOLD has saved it; a slower sibling must not put the
// open row back (with safety 6). Mutation: no comparison of revisions.
func TestSafety06NewerSnapshotStays(t *testing.T) {
	path := t.TempDir()
	const savers, each = 4, 12
	var wg sync.WaitGroup
	for range savers {
		d := openDir(t, path)
		wg.Go(func() {
			for _, i := range rand.Perm(each) {
				revision := uint64(i + 1)
				if err := d.SaveSnapshot(revision, fmt.Append(nil, revision)); err != nil {
					t.Error(err)
				}
				got, err := d.LoadSnapshot()
				var there uint64
				if _, scanErr := fmt.Sscan(string(got), &there); err != nil || scanErr != nil || there < revision {
					t.Errorf("after saving %d: %q, %v", revision, got, err)
				}
			}
		})
	}
	wg.Wait()
	wantSnapshot(t, openDir(t, path), fmt.Sprint(each))
}

func TestSnapshotDamaged(t *testing.T) {
	path := t.TempDir()
	d := openDir(t, path)
	if err := d.SaveSnapshot(5, []byte("abcdefgh")); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(path, "snapshot")
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for name, bad := range map[string]string{
		"empty": "", "cut": string(good[:len(good)-1]), "cut head": string(good[:9]), "zeros": strings.Repeat("\x00", len(good)),
		"flipped": strings.Replace(string(good), "abc", "abd", 1), "newer": strings.Replace(string(good), "snapshot 1", "snapshot 2", 1),
	} {
		writeFile(t, file, bad)
		if got, err := d.LoadSnapshot(); err == nil {
			t.Errorf("%s: took %q", name, got)
		}
	}
	if err := d.SaveSnapshot(1, []byte("whole")); err != nil {
		t.Errorf("a damaged snapshot cannot be replaced: %v", err)
	}
	wantSnapshot(t, d, "whole")
}

// No fsync may fail unnoticed: the floor would be acked and not be there.
// The first is the file's, the second the directory's.
func TestSafety06FsyncFails(t *testing.T) {
	for n := 1; n <= 2; n++ {
		path := t.TempDir()
		d := openDir(t, path)
		if err := d.SaveSnapshot(8, []byte("eight")); err != nil {
			t.Fatal(err)
		}
		c := start(t, []string{"-o", "/dev/null", "-e", "trace=fsync", "-e", fmt.Sprintf("inject=fsync:error=EIO:when=%d", n)}, "save", path, "")
		if got := c.ask(""); !strings.Contains(got, "input/output error") {
			t.Errorf("fsync %d: SaveSnapshot said %q", n, got)
		}
		c.end()
		wantSnapshot(t, d, "eight")
	}
}

func FuzzSnapshot(f *testing.F) {
	f.Add([]byte("posthouse-snapshot 1 5 00000000\n"))
	f.Fuzz(func(t *testing.T, raw []byte) { _, _, _ = parseSnapshot(raw) })
}
