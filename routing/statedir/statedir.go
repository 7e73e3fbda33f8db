// Package statedir is what a frontend keeps on the disk of its own machine:
// the newest snapshot of the role table, the role in which each user was
// last, and, for the file store, the table itself. All frontends of one
// machine may share one directory; every method may be called by several of
// them, and by several goroutines, at once.
//
//	machine-id              the machine that the directory belongs to
//	snapshot, .lock         the newest role table that any frontend here saw
//	roles-last-used, .lock  one line per user: user TAB role
//	frontends/ID.lock       held by the frontend ID for as long as it lives
//	table.json, …           see package filestore
package statedir

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Dir is one state directory. Close it when nobody uses it any more.
type Dir struct {
	path  string
	fs    string // the kind of file system, "" if it is an ordinary one
	roles *roles
}

// lockPatience bounds the wait for a lock that siblings hold for
// milliseconds only. Longer means that one of them was stopped inside, or
// that the disk hangs: "could not tell" then, rather than waiting on.
const lockPatience = 5 * time.Second

// Open returns the state directory at path and creates it, mode 0700, if
// there is none. It refuses a directory that another machine wrote (a copy),
// one on a network file system, and one that everybody may write.
func Open(path string) (*Dir, error) {
	return open(path, []string{"/etc/machine-id", "/var/lib/dbus/machine-id"})
}

func open(path string, machineIDs []string) (*Dir, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, fmt.Errorf("state_dir: %w", err)
	}
	d := &Dir{path: path}
	if err := d.inspect(); err != nil {
		return nil, fmt.Errorf("state_dir %s: %w", path, err)
	}
	if err := d.claim(machineIDs); err != nil {
		return nil, err
	}
	d.roles, err = openRoles(d)
	if err != nil {
		return nil, err
	}
	return d, nil
}

// Path is the absolute path of the directory.
func (d *Dir) Path() string { return d.path }

// Volatile names the file system if it forgets everything at a reboot
// (tmpfs, ramfs), and is empty otherwise. A table kept there would be seeded
// from the configuration again after each boot.
func (d *Dir) Volatile() string { return d.fs }

// Close frees what d holds. It must not be in use any more.
func (d *Dir) Close() error { return d.roles.close() }

func (d *Dir) join(name string) string { return filepath.Join(d.path, name) }

// inspect refuses directories in which nothing can be kept safely.
func (d *Dir) inspect() error {
	info, err := os.Stat(d.path)
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return errors.New("not a directory")
	}
	if info.Mode().Perm()&0o002 != 0 {
		return fmt.Errorf("mode %04o lets everybody write it; chmod 0700", info.Mode().Perm())
	}
	var st unix.Statfs_t
	if err := unix.Statfs(d.path, &st); err != nil {
		return &fs.PathError{Op: "statfs", Path: d.path, Err: err}
	}
	d.fs, err = judgeFS(int64(st.Type))
	return err
}

// networked file systems, by magic number (statfs(2), linux/magic.h). Locks
// and fsync mean something else there, or nothing, and a second host sees the
// same files: the file store is for one host, and so are the snapshots.
var networked = map[int64]string{
	0x6969:     "NFS",
	0x517B:     "SMB",
	0xFF534D42: "CIFS",
	0xFE534D42: "SMB2",
	0x65735546: "FUSE", // sshfs, GlusterFS, s3fs, … or local: it cannot be told from here
	0x01021997: "9P",
	0x5346414F: "AFS",
	0x6B414653: "AFS",
	0x73757245: "Coda",
	0x00C36400: "Ceph",
	0x0BD00BD0: "Lustre",
	0x47504653: "GPFS",
	0x19830326: "BeeGFS",
	0x01161970: "GFS2",
	0x7461636F: "OCFS2",
	0x786F4256: "vboxsf",
	0xAAD7AAEA: "PanFS",
}

// judgeFS refuses network file systems (safety 13) and names volatile ones.
func judgeFS(magic int64) (volatile string, err error) {
	magic &= 0xFFFFFFFF // statfs.f_type is a signed 32 bit word on some machines
	if name, ok := networked[magic]; ok {
		return "", fmt.Errorf("lies on a %s file system, where locks and fsync do not hold what is needed; "+
			"put state_dir on a local disk (several hosts share the etcd store instead)", name)
	}
	switch magic {
	case unix.TMPFS_MAGIC:
		return "tmpfs", nil
	case unix.RAMFS_MAGIC:
		return "ramfs", nil
	}
	return "", nil
}

// claim writes the machine's ID into a new directory and refuses one that
// names another machine (safety 9). A cloned machine that kept its machine-id
// is not noticed here; that two frontends never have one ID is owed to the
// nonce in it.
func (d *Dir) claim(machineIDs []string) error {
	here, err := machineID(machineIDs)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), lockPatience)
	defer cancel()
	l, err := d.Lock(ctx, "machine-id.lock", Exclusive)
	if err != nil {
		return err
	}
	defer l.Unlock()
	raw, err := os.ReadFile(d.join("machine-id"))
	if errors.Is(err, fs.ErrNotExist) {
		return d.WriteFile("machine-id", []byte(here+"\n"))
	}
	if err != nil {
		return err
	}
	if owner := strings.TrimSpace(string(raw)); owner != here {
		return fmt.Errorf("state_dir %s belongs to machine %q, and this is machine %s: the directory or the whole "+
			"virtual machine was copied. What it remembers may be wrong here. Start with an empty state_dir; "+
			"only if this machine replaces the other one, which is gone for good, delete %s",
			d.path, owner, here, d.join("machine-id"))
	}
	return nil
}

// machineID reads the first of paths that holds one (machine-id(5)).
func machineID(paths []string) (string, error) {
	for _, path := range paths {
		raw, err := os.ReadFile(path)
		id := strings.TrimSpace(string(raw))
		if err == nil && len(id) == 32 && strings.Trim(id, "0123456789abcdef") == "" {
			return id, nil
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
	}
	return "", fmt.Errorf("this machine has no ID in %s; run systemd-machine-id-setup (or dbus-uuidgen --ensure) as root",
		strings.Join(paths, " or "))
}

// WriteFile replaces the file name in d by data, durably: a temporary file is
// written and fsynced, renamed, and the directory is fsynced. If it returns an
// error readers see the file as it was before, and after a power loss it is
// either the old or the new one, whole. The caller holds an exclusive Lock
// that all writers of name share.
func (d *Dir) WriteFile(name string, data []byte) error {
	return d.replaceFile(name, func(w io.Writer) error {
		_, err := w.Write(data)
		return err
	})
}

func (d *Dir) replaceFile(name string, write func(io.Writer) error) error {
	path, temp, old := d.join(name), d.join(name+".tmp"), d.join(name+".old")
	if err := writeSynced(temp, write); err != nil {
		return err
	}
	if err := os.Remove(old); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Link(path, old); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Rename(temp, path); err != nil {
		return err
	}
	if err := d.Sync(); err != nil {
		return errors.Join(err, d.putBack(path, old))
	}
	// Left behind by a crash it does no harm.
	_ = os.Remove(old)
	return nil
}

// putBack undoes a rename that may not survive a power loss, so that nobody
// acts on what was never promised.
func (d *Dir) putBack(path, old string) error {
	err := os.Rename(old, path)
	if errors.Is(err, fs.ErrNotExist) { // there was no file before
		err = os.Remove(path)
	}
	_ = d.Sync() // it has just failed; the caller gets that error
	return err
}

func writeSynced(path string, write func(io.Writer) error) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	err = write(f)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// Sync makes the directory's entries durable. Who reads a file that a sibling
// renamed into place, and acts on it, calls it first: the sibling may have
// been killed before it could.
func (d *Dir) Sync() error {
	f, err := os.Open(d.path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// readLimited reads the file at path, which may not be longer than limit.
func readLimited(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("%s is longer than %d bytes", path, limit)
	}
	return data, nil
}
