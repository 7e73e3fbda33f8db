package spool

import (
	"fmt"
	"sync/atomic"
)

// Disk bounds what the files of several Spools hold together: their directory
// has more important things to hold.
type Disk struct {
	max  int64
	used atomic.Int64
}

// NewDisk makes a Disk of max octets.
func NewDisk(max int64) *Disk { return &Disk{max: max} }

// take reserves n octets, or says why not. A nil Disk has no bound.
func (d *Disk) take(n int64) error {
	if d == nil {
		return nil
	}
	if d.used.Add(n) > d.max {
		d.used.Add(-n)
		return fmt.Errorf("all spool files together hold no more than %d octets", d.max)
	}
	return nil
}

func (d *Disk) give(n int64) {
	if d != nil {
		d.used.Add(-n)
	}
}
