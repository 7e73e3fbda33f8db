package statedir

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
)

// snapshotMax bounds a snapshot: 1000 roles take less than 1 MiB.
const snapshotMax = 256 << 20

// errDamaged: the file is there, but is not what posthouse wrote.
var errDamaged = errors.New("damaged")

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// SaveSnapshot keeps data, the role table at revision, and returns when it is
// on the disk. A snapshot of a higher revision that a sibling saved stays; it
// is on the disk then, and that is success too: when SaveSnapshot returns
// nil, no start from disk will see anything older than revision.
func (d *Dir) SaveSnapshot(revision uint64, data []byte) error {
	return d.saveSnapshot(revision, data, false)
}

// ReplaceSnapshot is SaveSnapshot whatever revision is there now: for the
// operator who decided that a store which went back is right.
func (d *Dir) ReplaceSnapshot(revision uint64, data []byte) error {
	return d.saveSnapshot(revision, data, true)
}

// LoadSnapshot returns what was saved with the highest revision; nil, nil if
// nothing ever was. A snapshot that cannot be read, or not be trusted, is an
// error. The caller may keep data.
func (d *Dir) LoadSnapshot() (data []byte, err error) {
	_, data, err = d.loadSnapshot()
	return data, err
}

func (d *Dir) saveSnapshot(revision uint64, data []byte, force bool) error {
	if len(data) > snapshotMax/2 {
		return fmt.Errorf("snapshot of %d bytes is too long", len(data))
	}
	ctx, cancel := context.WithTimeout(context.Background(), lockPatience)
	defer cancel()
	l, err := d.Lock(ctx, "snapshot.lock", Exclusive)
	if err != nil {
		return err
	}
	defer l.Unlock()
	there, old, err := d.loadSnapshot()
	switch {
	case errors.Is(err, errDamaged): // no use to anybody; what we have is whole
	case err != nil:
		return err
	case old == nil || force:
	case there > revision || there == revision && bytes.Equal(old, data):
		// Whoever renamed it into place may have been killed before its fsync.
		return d.Sync()
	}
	head := fmt.Appendf(nil, snapshotHead, revision, crc32.Checksum(data, castagnoli))
	return d.WriteFile("snapshot", append(head, data...))
}

// snapshotHead is the first line: format 1, revision, checksum of the rest.
const snapshotHead = "posthouse-snapshot 1 %d %08x\n"

func (d *Dir) loadSnapshot() (revision uint64, data []byte, err error) {
	raw, err := readLimited(d.join("snapshot"), snapshotMax)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil, nil
	}
	if err != nil {
		return 0, nil, err
	}
	revision, data, err = parseSnapshot(raw)
	if err != nil {
		return 0, nil, fmt.Errorf("%s: %w", d.join("snapshot"), err)
	}
	return revision, data, nil
}

func parseSnapshot(raw []byte) (revision uint64, data []byte, err error) {
	head, data, _ := bytes.Cut(raw, []byte("\n"))
	var sum uint32
	if _, err := fmt.Sscanf(string(head)+"\n", snapshotHead, &revision, &sum); err != nil {
		return 0, nil, fmt.Errorf("%w: not a snapshot of format 1: %w", errDamaged, err)
	}
	if crc32.Checksum(data, castagnoli) != sum {
		return 0, nil, fmt.Errorf("%w: the checksum does not match", errDamaged)
	}
	return revision, data[:len(data):len(data)], nil
}
