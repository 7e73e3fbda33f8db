package etcdstore

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"maps"
	"slices"

	"github.com/posthouse/posthouse/routing"
)

const (
	// format is the version of the layout.
	format = 1

	// Roles, and overrides, are spread over so many parts by the hash of their
	// names, so that a change of one writes a 64th of the table and a change
	// of all is still a few dozen keys.
	roleParts     = 64
	overrideParts = 16
	// historyPart ended switches with consecutive numbers are in one part.
	historyPart = 8

	// partMax bounds a part: etcd takes 1.5 MiB in a request. What is longer is
	// cut in halves; one role, or one record, must fit.
	partMax = 1400 << 10

	// writersKept is for how many commits the table tells who wrote them.
	writersKept = 64
)

// table is the key that every commit replaces.
type table struct {
	Format   int    `json:"format"`
	Revision uint64 `json:"revision"`
	Switches uint64 `json:"switches"`
	// Parts are the hashes of the parts. History is in their order.
	Parts []string `json:"parts"`
	// Writers has a random mark of each of the last commits, newest last. By
	// it one who got no answer finds out whether the commit is his.
	Writers []string `json:"writers"`
}

// part is some of a State.
type part struct {
	Roles     map[string]routing.Row       `json:"roles,omitempty"`
	Frontends map[string]routing.Frontend  `json:"frontends,omitempty"`
	Overrides map[string]string            `json:"overrides,omitempty"`
	Backends  map[string]map[string]string `json:"backends,omitempty"`
	Settings  map[string]string            `json:"settings,omitempty"`
	History   []routing.SwitchRecord       `json:"history,omitempty"`
}

// view is a table as it was, or will be, in etcd. Nobody edits it.
type view struct {
	table table
	raw   []byte // the table's value; nil if there is none
	mod   int64  // etcd's revision of it; 0 if there is none
	parts map[string]part
	state *routing.State
}

// hashOf names a part: 128 bits of SHA-256.
func hashOf(raw []byte) string {
	sum := sha256.Sum256(raw)
	return base64.RawURLEncoding.EncodeToString(sum[:16])
}

// split takes a State apart: the hashes in order, and the parts by hash.
func split(s *routing.State) (hashes []string, raw map[string][]byte, err error) {
	var parts []part
	for _, roles := range spread(s.Roles, roleParts) {
		parts = append(parts, part{Roles: roles})
	}
	for _, overrides := range spread(s.Overrides, overrideParts) {
		parts = append(parts, part{Overrides: overrides})
	}
	for _, id := range slices.Sorted(maps.Keys(s.Frontends)) {
		parts = append(parts, part{Frontends: map[string]routing.Frontend{id: s.Frontends[id]}})
	}
	if len(s.Backends)+len(s.Settings) > 0 {
		parts = append(parts, part{Backends: s.Backends, Settings: s.Settings})
	}
	for rest := s.History; len(rest) > 0; {
		n := 1
		for n < len(rest) && rest[n].Number/historyPart == rest[0].Number/historyPart && n < historyPart {
			n++
		}
		parts, rest = append(parts, part{History: rest[:n]}), rest[n:]
	}
	raw = make(map[string][]byte, len(parts))
	for len(parts) > 0 {
		p := parts[0]
		b, err := json.Marshal(p)
		if err != nil {
			return nil, nil, fmt.Errorf("role table: %w", err)
		}
		if len(b) > partMax {
			halves := p.halves()
			if halves == nil {
				return nil, nil, fmt.Errorf("role table: it does not fit into etcd: a part has %d bytes, at most %d can be written: %.80s…",
					len(b), partMax, b)
			}
			parts = append(halves, parts[1:]...)
			continue
		}
		h := hashOf(b)
		hashes, parts = append(hashes, h), parts[1:]
		raw[h] = b
	}
	return hashes, raw, nil
}

// halves cuts a part in two, in the order of its names or numbers; nil if it is
// but one thing.
func (p part) halves() []part {
	switch n := len(p.History) / 2; {
	case len(p.Roles) > 1:
		one, other := halve(p.Roles)
		return []part{{Roles: one}, {Roles: other}}
	case len(p.Overrides) > 1:
		one, other := halve(p.Overrides)
		return []part{{Overrides: one}, {Overrides: other}}
	case n > 0:
		return []part{{History: p.History[:n]}, {History: p.History[n:]}}
	}
	return nil
}

func halve[V any](m map[string]V) (one, other map[string]V) {
	one, other = make(map[string]V), make(map[string]V)
	for i, name := range slices.Sorted(maps.Keys(m)) {
		if i < len(m)/2 {
			one[name] = m[name]
		} else {
			other[name] = m[name]
		}
	}
	return one, other
}

// spread deals m out to n maps; those that stay empty are left out.
func spread[V any](m map[string]V, n uint32) []map[string]V {
	all := make([]map[string]V, n)
	for name, value := range m {
		h := fnv.New32a()
		_, _ = io.WriteString(h, name)
		i := h.Sum32() % n
		if all[i] == nil {
			all[i] = make(map[string]V)
		}
		all[i][name] = value
	}
	return slices.DeleteFunc(all, func(m map[string]V) bool { return m == nil })
}

// errIncomplete: a part is missing.
var errIncomplete = errors.New("a part is missing")

// newView puts a table together out of parts that were decoded before, and
// others that were not. errIncomplete if one is in neither. raw is nil for an
// empty store; the maps of the State are never nil.
func newView(raw []byte, mod int64, known map[string]part, fresh map[string][]byte) (*view, error) {
	v := &view{raw: raw, mod: mod, parts: map[string]part{}}
	if raw != nil {
		var err error
		if v.table, err = decodeTable(raw); err != nil {
			return nil, untrusted(err)
		}
	}
	for _, h := range v.table.Parts {
		p, ok := known[h]
		if !ok {
			b, ok := fresh[h]
			if !ok {
				return nil, fmt.Errorf("role table of revision %d: %w", v.table.Revision, errIncomplete)
			}
			if hashOf(b) != h {
				return nil, untrusted(fmt.Errorf("part %s is damaged, or was changed by hand", h))
			}
			if err := strictly(b, &p); err != nil {
				return nil, untrusted(fmt.Errorf("part %s: %w", h, err))
			}
		}
		v.parts[h] = p
	}
	v.state = join(v.table, v.parts)
	return v, nil
}

func join(t table, parts map[string]part) *routing.State {
	s := &routing.State{
		Revision: t.Revision, Switches: t.Switches,
		Roles: map[string]routing.Row{}, Frontends: map[string]routing.Frontend{},
		Overrides: map[string]string{}, Backends: map[string]map[string]string{}, Settings: map[string]string{},
	}
	for _, h := range t.Parts {
		p := parts[h]
		maps.Copy(s.Roles, p.Roles)
		maps.Copy(s.Frontends, p.Frontends)
		maps.Copy(s.Overrides, p.Overrides)
		maps.Copy(s.Backends, p.Backends)
		maps.Copy(s.Settings, p.Settings)
		s.History = append(s.History, p.History...)
	}
	return s
}

func untrusted(err error) error {
	return fmt.Errorf("role table in etcd cannot be trusted: %w: restore it, or delete it: "+
		"then its roles are in doubt, and `posthouse roles init` decides", err)
}

func decodeTable(raw []byte) (table, error) {
	var t table
	var version struct {
		Format int `json:"format"`
	}
	// The version first: a newer layout would fail below with a riddle.
	if err := json.Unmarshal(raw, &version); err != nil {
		return t, err
	}
	if version.Format != format {
		return t, fmt.Errorf("format %d, this posthouse knows %d", version.Format, format)
	}
	if err := strictly(raw, &t); err != nil {
		return t, err
	}
	if t.Revision == 0 {
		return t, errors.New("revision 0, which was never written")
	}
	return t, nil
}

// strictly decodes one JSON value without unknown fields and without more
// behind it.
func strictly(raw []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(raw))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("more follows behind the end")
	}
	return nil
}
