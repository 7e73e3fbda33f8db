package catchup

import (
	"maps"
	"slices"
	"strings"
)

// item is one thing that a user can have; mailbox is empty for what belongs to
// none.
type item struct{ mailbox, what string }

// holdings are what a member holds for a user: item → its value in words. What
// is not there, the user does not have.
type holdings map[item]string

// What the items are called.
const (
	whatMailbox      = "mailbox" // with its special use
	whatStatus       = "status"
	whatFlags        = "flags"
	whatSubscription = "subscription"
	whatACL          = "ACL"
	whatQuota        = "quota"
	whatLimits       = "limits of " // and the quota root
	whatScript       = "script "    // and its name, quoted
	whatActive       = "active script"
)

// difference compares all items. Of a mailbox that only one side has, that is
// said, and nothing else.
func difference(user string, from, to holdings) []Difference {
	all := maps.Clone(from)
	maps.Copy(all, to)
	items := slices.SortedFunc(maps.Keys(all), func(x, y item) int {
		if c := strings.Compare(x.mailbox, y.mailbox); c != 0 {
			return c
		}
		return strings.Compare(x.what, y.what)
	})
	var found []Difference
	for _, it := range items {
		existence := item{it.mailbox, whatMailbox}
		onOne := (from[existence] == "") != (to[existence] == "")
		if from[it] != to[it] && (it == existence || !onOne) {
			found = append(found, Difference{user, it.mailbox, it.what, from[it], to[it]})
		}
	}
	return found
}
