package config

import (
	"fmt"
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"
)

// TestReference compares docs/configuration.md with the structs: one row for
// each key, with its default, and no row for a key that does not exist.
func TestReference(t *testing.T) {
	content, err := os.ReadFile("../docs/configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := make(map[string]string) // key → default
	for _, m := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\| ([^|]*) \\|").FindAllStringSubmatch(string(content), -1) {
		if _, twice := rows[m[1]]; twice {
			t.Errorf("%s has two rows", m[1])
		}
		rows[m[1]] = m[2]
	}
	want := make(map[string]string)
	defaults := Default()
	defaults.Backends = map[string]Backend{"": defaultBackend()}
	leaves(reflect.ValueOf(*defaults), "", want)
	for key, value := range want {
		got, ok := rows[key]
		switch {
		case !ok:
			t.Errorf("no row for %s", key)
		case value != "" && got != "`"+value+"`":
			t.Errorf("%s: the row's default is %s, the code's %s", key, got, value)
		}
	}
	for key := range rows {
		if _, ok := want[key]; !ok {
			t.Errorf("a row for %s, which does not exist", key)
		}
	}
}

// leaves collects the keys below v with their defaults, "" where there is none.
// A list's items are written listeners[].address, a map's backends.NAME.imap.
func leaves(v reflect.Value, path string, into map[string]string) {
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			leaves(v.Field(i), join(path, v.Type().Field(i).Tag.Get("yaml")), into)
		}
	case reflect.Map:
		element := reflect.Zero(v.Type().Elem())
		if v.Len() == 1 {
			element = v.MapIndex(reflect.ValueOf(""))
		}
		leaves(element, path+".NAME", into)
	case reflect.Slice:
		if v.Type().Elem().Kind() == reflect.Struct {
			leaves(reflect.Zero(v.Type().Elem()), path+"[]", into)
			return
		}
		into[path] = ""
	default:
		into[path] = ""
		if !v.IsZero() || v.Kind() == reflect.Bool && !strings.Contains(path, "[]") {
			into[path] = written(v)
		}
	}
}

// written is a default as the file would say it.
func written(v reflect.Value) string {
	if d, ok := v.Interface().(time.Duration); ok {
		switch {
		case d > 2*time.Minute:
			return fmt.Sprintf("%dm", d/time.Minute)
		default:
			return fmt.Sprintf("%ds", d/time.Second)
		}
	}
	return fmt.Sprint(v.Interface())
}
