package filestore

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/posthouse/posthouse/routing"
)

// format is the version of the file's layout.
const format = 1

// envelope is the file: a checksum around the state, since a flipped bit in
// the name of an active is still good JSON.
type envelope struct {
	Format int `json:"format"`
	// CRC32C of the state as compact JSON, in hexadecimal.
	CRC32C string          `json:"crc32c"`
	State  json.RawMessage `json:"state"`
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func checksum(compact []byte) string {
	return fmt.Sprintf("%08x", crc32.Checksum(compact, castagnoli))
}

func encode(s *routing.State) ([]byte, error) {
	state, err := json.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("role table: %w", err)
	}
	raw, err := json.MarshalIndent(envelope{format, checksum(state), state}, "", " ")
	if err != nil {
		return nil, fmt.Errorf("role table: %w", err)
	}
	return append(raw, '\n'), nil
}

// decode reads what encode wrote. nil, as of a file that does not exist, is
// an empty table; everything else that encode did not write is an error. The
// maps of the State are never nil.
func decode(raw []byte) (*routing.State, error) {
	s := &routing.State{}
	if raw != nil {
		if err := decodeInto(s, raw); err != nil {
			return nil, fmt.Errorf("role table %s cannot be trusted: %w: put a good copy in its place, or move it away: "+
				"then its roles are in doubt, and `posthouse roles init` decides", tableName, err)
		}
	}
	fill(&s.Roles)
	fill(&s.Frontends)
	fill(&s.Overrides)
	fill(&s.Backends)
	fill(&s.Settings)
	return s, nil
}

func fill[V any](m *map[string]V) {
	if *m == nil {
		*m = map[string]V{}
	}
}

func decodeInto(s *routing.State, raw []byte) error {
	var version struct {
		Format int `json:"format"`
	}
	// The version first: a newer layout would fail below with a riddle.
	if err := json.Unmarshal(raw, &version); err != nil {
		return fmt.Errorf("damaged or cut off: %w", err)
	}
	if version.Format != format {
		return fmt.Errorf("format %d, this posthouse knows %d", version.Format, format)
	}
	var e envelope
	if err := strictly(raw, &e); err != nil {
		return err
	}
	var compact bytes.Buffer
	if err := json.Compact(&compact, e.State); err != nil {
		return fmt.Errorf("no state: %w", err)
	}
	if sum := checksum(compact.Bytes()); sum != e.CRC32C {
		return fmt.Errorf("checksum is %s, the file says %q: damaged, or changed by hand", sum, e.CRC32C)
	}
	if compact.Bytes()[0] != '{' {
		return errors.New("the state is no object")
	}
	if err := strictly(e.State, s); err != nil {
		return err
	}
	if s.Revision == 0 {
		return errors.New("revision 0, which was never written")
	}
	return nil
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
