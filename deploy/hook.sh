# shellcheck shell=sh
# What posthouse-cyrus and posthouse-dovecot share: configuration, the order of
# calls, the way to another host, the steps of a switch. They source it and
# define what it calls:
#
#	config_of PART prints the instance's configuration file as that part
#	check_instance refuses an instance that is laid out in another way
#	look           sees which processes the instance has, and sets part: master, replica,
#	               starts, remains (processes, but no server) or stopped
#	members        prints the ids of those that the last look has seen
#	ready PART     says whether the instance, which was that part at the last look,
#	               takes connections
#	run_as PART    becomes the server
#	spent PID…     says whether these, the members at the last look, all that is left of
#	               a server that was told to end, have nothing to do with mail: they
#	               need not be waited for
#	stopped        clears up behind a server that has ended
#	unsent         prints what the instance, as master, had not sent its peer; it
#	               may be unable to know
#	settle         removes, after a rejoin, what only the stale instance has
#	agree          makes sure, after a catch-up, that the new one has what the old
#	               one has
#	do_OP          one stage of a step on one backend, under the instance's lock
#
# Words: an *instance* is one mail server process tree; it carries the name of
# the posthouse backend that it is. As *master* it serves users, as *replica* it
# only takes what its peer sends.

LC_ALL=C
export LC_ALL
umask 077
nl='
'

say() { printf '%s: %s\n' "${name:-${0##*/}}" "$*"; }
fail() { say "$*" >&2; exit 1; }
later() { say "$* (try again)" >&2; exit 75; } # EX_TEMPFAIL

# read_config reads the configuration, and refuses what would be ignored silently.
# It is read, never run: a value ends where its line ends and means what it says.
read_config() {
	[ -r "$config" ] || fail "cannot read $config"
	settings=$nl
	while IFS= read -r line || [ -n "$line" ]; do
		case ${line%%=*} in
		'' | '#'*) ;;
		ssh | start | stop | ask | ask_for | state | limit | catch_up_all | catch_up_users | program | doveadm | compare) ;;
		*.host | *.dir | *.peer | *.roles | *.sync | *.mail | *.off) ;;
		*) fail "$config: unknown key: ${line%%=*}" ;;
		esac
		settings=$settings$line$nl
	done <"$config"
}

# get KEY [DEFAULT] sets value to what the configuration has, the last one.
get() {
	case $settings in
	*"$nl$1="*)
		value=${settings##*"$nl$1="}
		value=${value%%"$nl"*}
		;;
	*) value=${2-} ;;
	esac
}

# setting KEY [DEFAULT] prints it.
setting() {
	get "$@"
	printf '%s\n' "$value"
}

# command_for KEY runs the configured command for the instance: % in its words
# is the instance's name. It does not hold the instance's lock.
command_for() {
	get "$1"
	set -f
	# shellcheck disable=SC2086 # the command's words
	set -- $value
	set +f
	[ $# -gt 0 ] || return 0
	for word; do
		shift
		case $word in *%*) word=${word%%%*}$name${word#*%} ;; esac
		set -- "$@" "$word"
	done
	timeout --foreground -k 1 "$(left)" "$@" </dev/null 9>&-
}

# clock sets now to hundredths of a second, by a clock that nobody sets.
clock() {
	read -r up _ </proc/uptime
	now=${up%.*}${up#*.}
}

# deadline_in SECONDS gives what follows so much time, all together.
deadline_in() { clock && deadline=$((now + $1 * 100)); }

# left prints the seconds that are left of it, at least one.
left() {
	clock
	set -- $(((deadline - now) / 100))
	if [ "$1" -ge 1 ]; then echo "$1"; else echo 1; fi
}

over() { clock && [ "$now" -ge "$deadline" ]; }

# seen OPTIONS FILE… prints id, program, option and file of each process that has one
# of the files as the argument of one of the options (a list of words), for each one
# that it has. Who only looks at a file is none of the instance's. What is not seen
# would count as gone. So this must not fail quietly (it has to see itself); a process
# that is just becoming another program, and has no arguments for a moment, is looked
# at again; and so is what was born meanwhile. Zombies and the kernel's own processes
# have no arguments, and no program either.
seen() {
	perl -e '
		my %options = map { $_ => 1 } split / /, shift;
		my %files = map { $_ => 1 } @ARGV;
		my %known;
		chdir "/proc" or exit 1;
		for (my $new = 1; $new; ) {
			$new = 0;
			opendir my $proc, "." or exit 1;
			for my $id (grep { /^[0-9]/ && !$known{$_}++ } readdir $proc) {
				$new = 1;
				my $arguments = "";
				for (1 .. 100) {
					open my $file, "<", "$id/cmdline" or last;
					local $/;
					$arguments = <$file> // "";
					last if $arguments ne "" || !readlink "$id/exe" && !ending($id);
					select undef, undef, undef, 0.001;
				}
				my ($program, @words) = split /\0/, $arguments or next;
				$program =~ s{.*/}{};
				$program =~ s{[^\w.+-].*}{}s; # anybody may call his program what he likes
				$program = "?" if $program eq "";
				my $option = "";
				for my $word (@words) {
					print "$id $program $option $word\n" if $files{$word} && $options{$option};
					$option = $word;
				}
			}
		}
		exit !$known{$$};
		# ending: it has no memory any more, but what it had open (flag PF_EXITING).
		sub ending {
			open my $file, "<", "$_[0]/stat" or return 0;
			local $/;
			my ($state, $flags) = (<$file> // "") =~ /.*\) (\S) (?:\S+ ){5}(\d+)/s or return 0;
			$state !~ /[ZXx]/ && $flags & 4;
		}' -- "$@" || later "cannot see the processes of this host"
}

# ticket FILE PART says whether that is a ticket, or a used one, for a start as PART
# in this boot.
ticket() {
	[ -s "$state/$name.$1" ] || return 1
	read -r boot until to_be <"$state/$name.$1" || return 1
	read -r this_boot </proc/sys/kernel/random/boot_id
	read -r up _ </proc/uptime
	[ "$boot" = "$this_boot" ] && [ "${up%.*}" -le "$until" ] && [ "$to_be" = "${2:-$to_be}" ]
}

# is PART says whether the instance is that part. It waits for a start as PART that
# was begun, and until it takes connections. It is not where a stop was begun and did
# not come to its end: whoever does the stopping may be at it still.
is() {
	while :; do
		begun=
		! ticket ticket "$1" || begun=1 # before the look, which sees what has begun meanwhile
		look
		if [ "$part" = "$1" ]; then
			[ ! -e "$state/$name.stopping" ] || return 1
			if ready "$1"; then
				[ ! -e "$state/$name.ticket" ] || rm -f "$state/$name.ticket" # it would be for its next start
				return 0
			fi
			why="is a $1, but takes no connections"
		elif [ -n "$begun" ] || { [ "$part" = starts ] && ticket used "$1"; }; then
			why="does not start as $1"
		else
			return 1
		fi
		if over; then
			rm -f "$state/$name.ticket"
			later "$why"
		fi
		sleep 0.005
	done
}

# tally_of STEP prints the place of a step in a switch.
tally_of() {
	case $1 in
	prove) echo 1 ;; demote | fence) echo 2 ;; catch_up) echo 3 ;; promote) echo 4 ;; undo_promote) echo 5 ;; undo_demote) echo 6 ;;
	rejoin) echo 7 ;;
	*) return 1 ;;
	esac
}

# admit takes the instance's lock for the rest of this process, refuses a call
# that a newer one has overtaken, and remembers this one. Who dies loses the
# lock. Who hangs is waited for by its equals; a newer call gives it a second and
# ends it then, with what it has started in its process group.
admit() {
	rank=$(tally_of "$step")
	exec 9>>"$state/$name.lock"
	if ! flock -w 1 9; then
		judge
		[ -z "$newer" ] || overtake
		flock -w "$(left)" 9 || later "an earlier call still works on this instance"
	fi
	judge
	printf '%s\n' "$switch $epoch $attempt $rank $role $step" >"$state/$name.new"
	sync "$state/$name.new"
	mv "$state/$name.new" "$state/$name.last"
	sync "$state"
	echo $$ >"$state/$name.holder"
}

# judge refuses a call that is older than the last one, and says in newer whether
# it is a newer one.
judge() {
	newer=
	[ -s "$state/$name.last" ] || return 0
	read -r o_switch o_epoch o_attempt o_rank o_role o_step <"$state/$name.last"
	is="$step of $role, epoch $epoch, attempt $attempt, switch $switch"
	was="$o_step of $o_role, epoch $o_epoch, attempt $o_attempt, switch $o_switch"
	if [ "$switch" -lt "$o_switch" ] || { [ "$role" = "$o_role" ] && [ "$epoch" -lt "$o_epoch" ]; }; then
		fail "refused: $is: this instance has seen $was. If the role table was set up anew, remove $state/$name.last"
	fi
	if [ "$switch" -eq "$o_switch" ] && { [ "$attempt" -lt "$o_attempt" ] ||
		{ [ "$attempt" -eq "$o_attempt" ] && [ "$rank" -lt "$o_rank" ]; }; }; then
		fail "refused: $is: this instance has seen $was"
	fi
	[ "$switch $attempt $rank" = "$o_switch $o_attempt $o_rank" ] || newer=1
}

# overtake ends the call that has the lock, if it has: the file is open there (as
# 9, or wherever the shell keeps it while it redirects).
overtake() {
	read -r holder 2>/dev/null <"$state/$name.holder" || return 0
	[ -n "$(find "/proc/$holder/fd" -lname "$(readlink "/proc/$$/fd/9")" 2>/dev/null)" ] || return 0
	group=$(ps -o pgid= -p "$holder" | tr -d ' ')
	if [ "$group" = "$(ps -o pgid= -p $$ | tr -d ' ')" ]; then group=$holder; else group=-$group; fi
	say "ends an earlier call: $was"
	kill -s KILL -- "$group" 2>/dev/null || :
}

# at OP NAME SWITCH EPOCH ATTEMPT STEP ROLE PEER runs one stage on this host. A
# peer of "-" is none.
at() {
	[ $# -eq 8 ] || fail "refused: $# words"
	for word; do
		case $word in '' | *[!A-Za-z0-9._-]*) fail "refused: a word with other characters" ;; esac
	done
	for word in "$3" "$4" "$5"; do
		case $word in *[!0-9]* | ???????????????????*) fail "refused: no number" ;; esac
	done
	case $2 in [.-]*) fail "refused: no name" ;; esac
	op=$1 name=$2 switch=$3 epoch=$4 attempt=$5 step=$6 role=$7 peer=$8
	case $op:$step in
	register:undo_demote | register:undo_promote | register:fence | replica:demote | replica:promote | replica:undo_demote) ;;
	fence:fence | serves:rejoin | rejoin:rejoin | resend:rejoin | list:rejoin | surplus:rejoin | prune:rejoin | compare:rejoin) ;;
	prove:prove | demote:demote | catch_up:catch_up | catch_up_all:catch_up | list:catch_up | list_all:catch_up | agree:catch_up | promote:promote | undo_promote:undo_promote | undo_demote:undo_demote) ;;
	*) fail "refused: no step" ;;
	esac
	get "$name.dir"
	[ -n "$value" ] && [ -z "$(setting "$name.host")" ] || fail "refused: no instance of this host"
	find_instance
	# It comes with the number of the failover, which is over: whoever drove it.
	[ "$step" != rejoin ] || attempt=999999999
	deadline_in "$limit"
	case $op:$step in
	# They leave the instance as it is. It may have become the active by a later
	# switch than that failover, and no switch waits until all is copied.
	serves:* | list:rejoin | prune:* | resend:*) ;;
	*) admit ;;
	esac
	"do_$op"
}

# find_dir sets dir as the instance's processes have it among their arguments:
# without a slash at its end, and with its symbolic links.
find_dir() {
	get "$name.dir"
	[ -n "$value" ] || fail "$config does not know it"
	dir=$(CDPATH='' cd -L -- "$value" && pwd -L) || fail "$name.dir is no directory"
	case $dir in *[!A-Za-z0-9._/+@:=-]*) fail "$name.dir has characters in it that no server's command line may have: $dir" ;; esac
}

find_instance() {
	find_dir
	check_instance
}

do_register() { :; }

# do_replica makes sure that the instance is no master.
do_replica() {
	is replica && return
	[ "$part" != master ] || fail "is a master"
	restart_as replica
}

# do_fence ends the instance and leaves it so: what starts it next is a hook, or
# its host, which asks the table.
do_fence() {
	stop_all
	say "is stopped: no process of it is left"
}

do_serves() { look && [ "$part" = master ] || fail "is no master: there is nothing to copy"; }

# remote serves one request of another host: authorized_keys has
# command="…/posthouse-cyrus --remote".
remote() {
	case ${SSH_ORIGINAL_COMMAND-} in
	'' | *[!A-Za-z0-9._\ -]*) fail "refused: no request" ;;
	esac
	# shellcheck disable=SC2086 # words of harmless characters
	at $SSH_ORIGINAL_COMMAND
}

# on NAME OP runs a stage where the instance lives. Its exit status is the
# stage's; 255 says that the host was not reached.
on() {
	get "$1.host"
	where=$value
	set -- "$2" "$1" "$POSTHOUSE_SWITCH" "$POSTHOUSE_EPOCH" "$POSTHOUSE_ATTEMPT" "$POSTHOUSE_STEP" "$POSTHOUSE_ROLE" "${3:--}"
	if [ -z "$where" ]; then
		"$0" -c "$config" --at "$@" <&8 8<&- 9>&-
		return
	fi
	# A host whose disk has died may answer and never end. One that lives ends its
	# stage itself within the limit. Only a rejoin takes as long as it takes.
	case $POSTHOUSE_STEP in
	rejoin) set -- '' "$*" ;;
	*) set -- "timeout --foreground -k 1 ${patience:-$((limit + 2))}" "$*" ;;
	esac
	status=0
	set -f
	# shellcheck disable=SC2046,SC2086 # the command's words
	$1 $(setting ssh 'ssh -o BatchMode=yes -o ConnectTimeout=3 -o ServerAliveInterval=2 -o ServerAliveCountMax=2') "$where" "$2" <&8 8<&- || status=$?
	set +f
	case $status in
	124 | 137) return 255 ;;
	*) return "$status" ;;
	esac
}

# try NAME OP … is on, for a host that may be dead: it gets a third of the time, so
# that the undoing, which has little, comes to its end.
try() {
	patience=$(((limit + 2) / 3))
	on "$@" || case $? in
	255) say "$1: its host cannot be reached, or does not answer: going on without it" ;;
	75) exit 75 ;;
	*) exit 1 ;;
	esac
	patience=
}

# must NAME OP … is on, and the end of the hook where it fails.
must() {
	on "$@" && return
	case $? in
	75) exit 75 ;;
	255) later "$1: its host cannot be reached, or does not answer in time" ;;
	*) exit 1 ;;
	esac
}

# open_gate CHECK… runs a check of one backend, whose output is the hook's, while the
# other's stage begins, and tells that one at its gate how it ended.
open_gate() {
	status=0
	("$@" >&3 3>&-) || status=$?
	echo "$status"
}

# behind_gate NAME OP … is must, for a stage that has a gate.
behind_gate() {
	exec 8<&0 3>&-
	patience=$((2 * limit + 4)) # the stage has its time once more behind the gate
	must "$@"
}

# gate is in a stage before what needs the other backend. There it has its whole time
# again.
gate() {
	# Whoever is to say it may have gone without a word.
	ended=$(timeout --foreground "$((limit + 4))" head -n 1 9>&-) || :
	[ -n "$ended" ] || later "was not told to go on"
	[ "$ended" = 0 ] || exit "$ended"
	deadline_in "$limit"
}

# follows: nobody's server is stopped for a peer that cannot take over.
follows() { on "$to" replica "$from" || fail "$to is not ready to follow: $from serves on"; }

# turns: replication turns round, and the old master must be there to take it.
turns() { [ -z "$from" ] || must "$from" replica "$to"; }

# fence proves that the old master is off: by its host, which has ended every
# process, or by the site's command, which has cut the host's power.
fence() {
	must "$to" register "$from" # nobody is stopped for a peer that is not there, or late
	on "$from" fence "$to" && return
	case $? in
	255) why="its host cannot be reached, which proves nothing: it may be at work" ;;
	75) why="its host does not get it to end" ;;
	*) exit 1 ;;
	esac
	if [ -z "$(setting "$from.off")" ]; then
		fail "$from: $why. Add $from.off=COMMAND to $config: it has to cut the host's power (IPMI, hypervisor, switched outlet)" \
			"and to exit with 0 once it is off. Or make sure by hand, then: posthouse failover $POSTHOUSE_ROLE --to $to --accept-loss"
	fi
	say "$from: $why: cutting its power"
	must "$to" register "$from" # that has taken time: a newer call may have come
	name=$from
	deadline_in "$limit"
	command_for "$from.off" || fail "$from.off ended with $?: no proof that it is off"
	say "is off, by $from.off"
}

# for_seen NAME OP … is must, for the users that posthouse has seen: the stage reads
# their names. If posthouse does not know them all, the stage is OP_all.
for_seen() {
	op=$2
	if [ -n "${POSTHOUSE_USERS-}" ]; then exec 8<"$POSTHOUSE_USERS"; else op=${op}_all; fi
	must "$1" "$op" "$3"
	exec 8</dev/null
}

# hook STEP is one call of posthouse.
hook() {
	: "${POSTHOUSE_ROLE:?}" "${POSTHOUSE_TO:?}" "${POSTHOUSE_SWITCH:?}" "${POSTHOUSE_EPOCH:?}" "${POSTHOUSE_ATTEMPT:?}" "${POSTHOUSE_STEP:?}"
	from=${POSTHOUSE_FROM-} to=$POSTHOUSE_TO
	[ "$1" = "$POSTHOUSE_STEP" ] || fail "called for $1, but the step is $POSTHOUSE_STEP"
	for name in $from "$to"; do
		case $settings in
		*"$nl$name.dir="[!"$nl"]* | *"$nl$name.host="[!"$nl"]*) ;;
		*) fail "$config does not know it" ;;
		esac
	done
	name=
	get "${from:-none}.peer"
	if [ -n "$from" ] && [ "$1" != prove ] && { [ "$value" != "$to" ] || [ "$(setting "$to.peer")" != "$from" ]; }; then
		fail "$config: $from and $to are not each other's peer: $from's mail does not go to $to"
	fi
	exec 8</dev/null
	if [ -z "$from" ] && [ "$1" != promote ] && [ "$1" != undo_promote ]; then
		say "nobody served $POSTHOUSE_ROLE: nothing to do"
		return
	fi
	case $1 in
	fence) fence ;;
	rejoin)
		must "$from" serves "$to"
		must "$to" rejoin "$from"
		settle
		must "$from" resend "$to"
		must "$to" compare "$from"
		;;
	prove) must "$from" prove "$to" ;;
	demote)
		{ open_gate follows | behind_gate "$from" demote "$to"; } 3>&1
		;;
	catch_up)
		for_seen "$from" catch_up "$to"
		agree
		;;
	promote)
		{ open_gate turns | behind_gate "$to" promote "$from"; } 3>&1
		;;
	undo_promote)
		# What was begun may be on its way still. Whoever registers here waits
		# for it, and nothing older gets in afterwards.
		# A dead host lets nothing in.
		[ -z "$from" ] || try "$from" register "$to"
		must "$to" undo_promote "$from"
		;;
	undo_demote)
		must "$from" register "$to"
		# A dead host must not keep the role from going back to a living one. It is
		# no master: a promotion that was begun has been through undo_promote,
		# which insists; and when it boots it asks the table.
		try "$to" replica "$from"
		must "$from" undo_demote "$to"
		;;
	esac
}

# restart_as PART stops the instance and starts it in that part.
restart_as() {
	stop_all
	start_as "$1"
}

# begin_as PART starts the instance, with a ticket: it is good for one start, in
# this boot, for a minute. Any other start asks the table.
begin_as() {
	read -r boot </proc/sys/kernel/random/boot_id
	read -r up _ </proc/uptime
	printf '%s\n' "$boot $((${up%.*} + 60)) $1" >"$state/$name.ticket"
	command_for start || {
		rm -f "$state/$name.ticket" # nobody shall wait for that start
		later "the start command failed"
	}
}

# start_as PART waits until it takes connections, too.
start_as() {
	begin_as "$1"
	is "$1" || later "was started as $1 and has ended"
	say "runs as $1"
}

# step_down ends a master, and begins to start it as a replica. Whoever needs that next
# waits for it: what its peer lacks is sent from its files.
step_down() {
	stop_all
	begin_as replica
	say "is stopped, and starts as replica"
}

# stop_all ends every process of the instance: politely, and after two seconds
# by force, which also ends one that was stopped by a signal.
stop_all() {
	for file in "$state/$name.ticket" "$state/$name.used"; do
		[ ! -e "$file" ] || rm -f "$file"
	done
	: >"$state/$name.stopping"
	command_for stop || say "the stop command failed"
	clock
	began=$now sent=
	while look && [ "$part" != stopped ]; do
		left=$(members) || exit
		clock
		signal=
		# shellcheck disable=SC2086 # process ids; some may just have ended
		if [ -z "$sent" ]; then
			signal=TERM
		elif [ "$sent" = TERM ] && [ $((now - began)) -ge 200 ]; then
			signal=KILL
			say "ended by force:" $left
		fi
		sent=${signal:-$sent}
		# shellcheck disable=SC2086
		[ -n "$signal" ] || ! spent $left || signal=KILL
		# shellcheck disable=SC2086
		[ -z "$signal" ] || kill -s "$signal" $left 2>/dev/null || :
		! over || later "cannot be stopped: $left"
		sleep 0.005
	done
	rm -f "$state/$name.stopping"
	stopped
}

# marked sets marked to the number of the switch whose promotion the instance has
# seen last: what has changed on it since, the mark shows.
marked() {
	marked=
	[ ! -s "$state/$name.mark" ] || read -r marked <"$state/$name.mark"
}

# part_by_table decides what an instance is that no hook starts: what the role table
# says, else replica. But one that a failover has left behind starts by a rejoin
# only, and what died as master with mail that its peer lacks may be one: its peer
# would write over that mail before a rejoin has kept it.
part_by_table() {
	if is_active; then
		echo master
	elif is_stale || [ -n "$(unsent)" ]; then
		echo none
	else
		echo replica
	fi
}

# is_active asks the role table whether this backend serves all its roles,
# openly and beyond doubt. The word of a frontend that lets nobody in does not
# count: it may be cut off, and what it knows be old. After a power cut the
# frontends may need a while.
is_active() {
	roles=$(setting "$name.roles")
	[ -n "$roles" ] || return 1
	deadline_in "$(setting ask_for 60)"
	until asked || over; do sleep 1; done
	for role in $roles; do
		printf '%s\n' "$table" | jq -e --arg role "$role" --arg me "$name" \
			'[.[] | select(.role == $role)] | length == 1 and all(.active == $me and .phase == "open" and (.in_doubt | not) and (.blocked // "") == "")' \
			>/dev/null 2>&1 || return 1
	done
}

# asked sets table to what a frontend answers; true if one that lets people in did.
# jq -e takes nothing for no error, so nothing is no table.
asked() {
	set -f
	# shellcheck disable=SC2046 # the command's words
	table=$(timeout 5 $(setting ask 'posthouse roles -o json') </dev/null) || table=
	set +f
	case $table in '['*) ;; *) table='[]' ;; esac
	[ "$table" != '[]' ] && printf '%s\n' "$table" | jq -e 'all(.[]; (.blocked // "") == "")' >/dev/null 2>&1
}

# is_stale says whether the table that is_active has seen names this backend as
# left behind in any role.
is_stale() {
	[ "$(printf '%s\n' "${table-}" | jq --arg me "$name" 'any(.[]; .stale // {} | has($me))' 2>/dev/null)" = true ]
}

# main is the command line: -c FILE STEP | run NAME | --remote.
main() {
	config=$default_config
	if [ "${1-}" = -c ]; then
		config=$2
		shift 2
	fi
	read_config
	get state /var/lib/posthouse-hooks
	state=$value
	get limit 10
	limit=$value
	deadline_in "$limit"
	patience=
	name=
	case ${1-} in
	run | --run | --at | --remote)
		[ -r /proc/1/environ ] || fail "must be root, to see every process"
		[ -d "$state" ] || mkdir -p "$state"
		;;
	esac
	case ${1-} in
	prove | demote | catch_up | promote | undo_promote | undo_demote | fence | rejoin) hook "$1" ;;
	--remote) remote ;;
	--at)
		shift
		at "$@"
		;;
	run)
		# From here on this process counts as one of the instance: a hook that
		# stops the instance ends it too, before it has acted on an old answer.
		name=${2:?which instance?}
		find_dir
		exec "$0" -c "$config" --run "$name" --of "$(config_of master)" "$dir"
		;;
	--run)
		name=$2 dir=$5
		if mv "$state/$name.ticket" "$state/$name.used" 2>/dev/null && ticket used; then
			part=$to_be
		else
			find_instance
			part=$(part_by_table)
		fi
		if [ "$part" = none ]; then
			say "does not start: by the role table it is not the active, and is stale or had not sent all (" $(unsent) ")." \
				"\`posthouse rejoin\` starts it; or start it again when the table says that it is the active"
			exit 0
		fi
		say "starts as $part"
		umask 022 # the server has its own opinion
		run_as "$part"
		;;
	*) fail "usage: ${0##*/} [-c FILE] prove|demote|catch_up|promote|undo_promote|undo_demote|fence|rejoin | run NAME | --remote" ;;
	esac
}
