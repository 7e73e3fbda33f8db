// Package directory says which role a user has: sources for routing.Directory.
package directory

import (
	"context"
	"errors"

	"github.com/posthouse/posthouse/routing"
)

// Chain asks one directory after the other.
type Chain []routing.Directory

var _ routing.Directory = Chain(nil)

// errEmptyChain: nobody was asked, so nothing is certain.
var errEmptyChain = errors.New("no directory is configured")

// Lookup returns what the first directory that knows name says. Only one that
// is certain not to know it lets the next one answer: one that could not tell
// might have been the one (another role, or another canonical user).
func (c Chain) Lookup(ctx context.Context, name string) (routing.Entry, error) {
	err := errEmptyChain
	for _, d := range c {
		if err := ctx.Err(); err != nil {
			return routing.Entry{}, err
		}
		var entry routing.Entry
		entry, err = d.Lookup(ctx, name)
		if !errors.Is(err, routing.ErrUnknownUser) {
			return entry, err
		}
	}
	return routing.Entry{}, err
}
