package config

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// Error is one fault in a configuration file.
type Error struct {
	File string // as given to Load
	Line int    // of the value or, where that is missing, of what should hold it; from 1
	What string // what is wrong
	Fix  string // what to do
}

// Error returns `file:line: what is wrong; what to do`.
func (e Error) Error() string { return fmt.Sprintf("%s:%d: %s; %s", e.File, e.Line, e.What, e.Fix) }

// Errors is every fault of a configuration file, sorted by line. It is what
// Load returns.
type Errors []Error

// Error returns one fault per line.
func (e Errors) Error() string {
	lines := make([]string, len(e))
	for i, one := range e {
		lines[i] = one.Error()
	}
	return strings.Join(lines, "\n")
}

// sorted returns e by line, and within a line in the order of finding.
func (e Errors) sorted() Errors {
	slices.SortStableFunc(e, func(a, b Error) int { return cmp.Compare(a.Line, b.Line) })
	return e
}
